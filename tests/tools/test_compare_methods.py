# Copyright 2026 The NCP-DPO authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import compare_methods
import eval_win_rate
import numpy as np
import pictures
import psutil
import pytest
import scorers
from compare_methods import Outcome
from conftest import FORK_SERVER, ROOT, reset_accelerate
from intervals import win_rate_interval
from tiny_checkpoints import RESOLUTION, edit_json
from train_ncp_dpo_sd15 import Checkpoints


PROMPTS = ["a cat", "a dog", "a bird", "a cow", "a hen", "a pig"]
ROWS = """
[common]
pretrained_model_name_or_path = "{model}"
dataset_name = "{pairs}"
resolution = {resolution}
train_batch_size = 2
learning_rate = 0.01
ncp_error_scale = 1000
seed = [0, 1]

[rows.latent]
loss_space = "latent"

[rows.ncp-simpo]
loss_type = "simpo"

[evaluation]
steps = [1, 2]
prompts = {prompts}
scorers = ["{judges}:red", "{judges}:green"]
num_inference_steps = 1
resolution = {resolution}
num_images_per_prompt = 2

[launch]
num_processes = 1
"""
JUDGES = """
import numpy

def red(images, prompts):
    return [numpy.asarray(image)[..., 0].mean() for image in images]

def green(images, prompts):
    return [numpy.asarray(image)[..., 1].mean() for image in images]
"""


def run_here(launcher, script, words, log, show_progress):
    """What `launch` does, in this process."""
    reset_accelerate()
    log.parent.mkdir(parents=True, exist_ok=True)
    module, code = importlib.import_module(Path(script).stem), 0
    try:
        code = module.main(module.parse_args(words)) or 0
    except (RuntimeError, ValueError) as error:
        log.write_text(f"{error}\n")
        code = 1
    return Outcome(code, 0.5)


def create_compare(checkpoints, parquet, folder):
    """A function that writes a file of rows, edited by `(from, to)`, compares them in a folder, and returns that."""
    (folder / "judges.py").write_text(JUDGES)
    values = {"model": checkpoints["sd15"], "pairs": parquet, "judges": folder / "judges.py"}
    text = ROWS.format(**values, resolution=RESOLUTION, prompts=json.dumps(PROMPTS))

    def run(*edits, code=0):
        edited = text
        for old, new in edits:
            assert old in edited
            edited = edited.replace(old, new)
        (folder / "rows.toml").write_text(edited)
        words = [str(folder / "rows.toml"), "--output_dir", str(folder / "comparison")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare_methods, "launch", run_here)
            assert compare_methods.main(compare_methods.parse_args(words)) == code
        return folder / "comparison"

    return run


@pytest.fixture
def compare(checkpoints, parquet, tmp_path):
    return create_compare(checkpoints, parquet, tmp_path)


@pytest.fixture(scope="module")
def whole(checkpoints, parquet, tmp_path_factory):
    """The output folder of a comparison that nothing has interrupted."""
    return create_compare(checkpoints, parquet, tmp_path_factory.mktemp("whole"))()


def read_csv(folder):
    """Lines of comparison.csv by scorer, row and steps, without seconds and memory."""
    with open(folder / "comparison.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) > 0 and float(row.pop("peak_memory_gb")) == 0.5
    return {(row["scorer"], row["row"], int(row["steps"])): row for row in rows}


def test_numbers_are_those_of_eval_win_rate(whole, checkpoints, tmp_path):
    folder, scores = whole, {}
    for place in ("latent/seed-0", "latent/seed-1", "ncp-simpo/seed-0", "ncp-simpo/seed-1"):
        for step in (1, 2):
            file = folder / "pictures" / place / f"step-{step}" / "scores.json"
            scores[place, step] = {name: values["scores"] for name, values in json.loads(file.read_text()).items()}
    words = ["--pretrained_model_name_or_path", checkpoints["sd15"], "--output_dir", tmp_path / "win-rate"]
    words += ["--lora_weights", folder / "rows/ncp-simpo/seed-1/checkpoint-2", "--prompts", *PROMPTS]
    words += [
        "--scorers",
        f"{whole.parent}/judges.py:red",
        f"{whole.parent}/judges.py:green",
        "--num_inference_steps",
        1,
    ]
    words += ["--resolution", RESOLUTION, "--num_images_per_prompt", 2]
    reset_accelerate()
    eval_win_rate.main(eval_win_rate.parse_args(list(map(str, words))))
    with open(tmp_path / "win-rate" / "scores.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    base = json.loads((folder / "pictures/base/scores.json").read_text())
    for name in ("judges.red", "judges.green"):
        assert scores["ncp-simpo/seed-1", 2][name] == [float(row[f"{name}_model"]) for row in expected]
        assert base[name]["scores"] == [float(row[f"{name}_baseline"]) for row in expected]

    def table(place, step, name):
        return np.reshape(scores[place, step][name], (6, 2))

    results = read_csv(folder)
    chosen = {}
    for row in ("latent", "ncp-simpo"):
        # The first, third and fifth prompt choose.
        choosing = {
            step: np.mean([table(f"{row}/seed-{seed}", step, "judges.red")[::2] for seed in (0, 1)]) for step in (1, 2)
        }
        chosen[row] = max(choosing, key=choosing.get)
        for step, score in choosing.items():
            result = results["judges.red", row, step]
            assert float(result["choosing_score"]) == pytest.approx(score)
            assert result["chosen"] == str(int(step == chosen[row])) and result["trainings"] == "2"
    for name in ("judges.red", "judges.green"):
        result = results[name, "ncp-simpo", 2]
        ours = [table(f"ncp-simpo/seed-{seed}", 2, name)[1::2] for seed in (0, 1)]
        first = [table(f"latent/seed-{seed}", chosen["latent"], name)[1::2] for seed in (0, 1)]
        bases = 2 * [np.reshape(base[name]["scores"], (6, 2))[1::2]]
        assert float(result["median"]) == pytest.approx(np.median(ours))
        for column, theirs in (("win_rate_over_base", bases), ("win_rate_over_first_row", first)):
            interval = win_rate_interval([((a > b) + (a == b) / 2).mean(axis=1) for a, b in zip(ours, theirs)])
            found = [float(result[f"{column}{end}"]) for end in ("", "_low", "_high")]
            assert found == pytest.approx(interval)
    assert results["judges.red", "latent", 1]["win_rate_over_first_row"] == ""

    text = (folder / "comparison.md").read_text(encoding="utf-8")
    rate, low, high = (
        float(results["judges.red", "latent", chosen["latent"]][f"win_rate_over_base{end}"])
        for end in ("", "_low", "_high")
    )
    assert f"| {rate:.0%} ({low:.0%} – {high:.0%}) |" in text
    assert (folder / "comparison.png").stat().st_size > 1000
    page = (folder / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="(\S+)"', page)
    assert len(sources) == 3 * 3 and all((folder / source).is_file() for source in sources)
    assert f"pictures/ncp-simpo/seed-0/step-{chosen['ncp-simpo']}/00001-00.png" in sources


class Killed(BaseException):
    pass


def test_killed_and_started_again_it_ends_with_the_same_numbers(whole, compare, monkeypatch):
    expected, calls = whole, []

    def kill_at(count, module, name):
        """Kills the run at a call of a function."""
        original, calls[:] = getattr(module, name), []

        def function(*values, **options):
            calls.append(name)
            if len(calls) == count:
                raise Killed
            return original(*values, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            with pytest.raises(Killed):
                compare()

    # After the first checkpoint of the second training, in the middle of drawing, and in the middle of scoring.
    kill_at(4, Checkpoints, "save")
    kill_at(8, pictures, "draw_batch")
    kill_at(3, scorers, "score_pictures")
    folder = compare()
    assert read_csv(folder) == read_csv(expected)
    drawn = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    # Nothing is left to do.
    monkeypatch.setattr(scorers, "score_pictures", None)
    monkeypatch.setattr(Checkpoints, "save", None)
    assert read_csv(compare()) == read_csv(expected)
    assert all(path.stat().st_mtime_ns == drawn[path] for path in drawn if path.name != "comparison.png")


def test_rows_that_fail_are_named_and_the_others_go_on(compare, capsys):
    folder = compare(
        ("seed = [0, 1]", "seed = 3"),
        ("steps = [1, 2]", "steps = [1]"),
        # The first step makes the LoRA infinite, which drawing finds.
        ('loss_space = "latent"', 'loss_space = "latent"\nlearning_rate = 1e30\n[rows.sum]\nsft_weight = 1e38'),
        code=1,
    )
    output, text = capsys.readouterr(), (folder / "comparison.md").read_text(encoding="utf-8")
    for job, row, log in (("Training", "sum", "sum-seed-3.log"), ("Drawing", "latent", "draw-latent-seed-3.log")):
        assert re.search(f"{job} .*failed: .*not finite.*\n.*{folder}/logs/{log}", output.err)
        assert f"**{row}, seed 3 failed** and is left out: its output is in `{folder}/logs/{log}`." in text
    assert {row for _, row, _ in read_csv(folder)} == {"ncp-simpo"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "edits, message",
    [
        ([("loss_type = ", "los_type = ")], r"\[rows.ncp-simpo\]: there is no flag --los_type"),
        ([('"simpo"', '"simple"')], r"\[rows.ncp-simpo\]: argument --loss_type: invalid choice: 'simple'"),
        (
            [("loss_type = ", "label_smoothing = 0.1\nloss_type = ")],
            r"\[rows.ncp-simpo\]: --label_smoothing goes with",
        ),
        (
            [('loss_space = "latent"', 'no_hflip = "yes"')],
            r"\[rows.latent\]: no_hflip is 'yes', but must be true or false",
        ),
        (
            [('"latent"', '"latent"\nresolution = 64')],
            "rows latent and ncp-simpo cannot be compared: resolution is 64 .* 32",
        ),
        ([('"latent"', '"latent"\nmax_train_samples = 4')], "cannot be compared: max_train_samples is 4 .* None"),
        ([('"latent"', '"latent"\nmax_train_steps = 4')], r"\[rows.latent\]: max_train_steps is set by this tool"),
        ([('"latent"', '"latent"\nseed = 4')], r"\[rows.latent\]: seed is given in \[common\]"),
        ([("[rows.latent]", "[rows.base]")], r"\[rows.base\]: a row's name"),
        ([("steps = [1, 2]", "")], r"\[evaluation\]: steps must be a list"),
        ([("seed = [0, 1]", "seed = [0, 0]")], r"\[common\]: seed is \[0, 0\]"),
        ([("seed = [0, 1]", "seed = [0, -1]")], r"\[common\]: seed is \[0, -1\]"),
        ([("seed = [0, 1]", "seed = []")], r"\[common\]: seed is \[\]"),
        ([("[rows.latent]", "[rows]")], r"\[rows\] must hold a table for each row"),
        ([("num_images_per_prompt", "num_images")], r"\[evaluation\]: there is no flag --num_images\."),
        ([("num_processes", "processes")], r"\[launch\]: there is no flag --processes"),
        ([("[launch]", "[launcher]")], r"there is no table \[launcher\]"),
        ([("[common]", "[common")], "rows.toml is no TOML"),
        ([("green", "blue")], "--scorers .*judges.py:blue: .* has no function blue"),
        (
            [('"a cat", "a dog", "a bird", "a cow", "a hen", ', '"Picture  number 3", ')],
            "1 prompts are not trained on",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_found_before_anything_runs(compare, edits, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(*edits)
    assert not (tmp_path / "comparison").exists()


def test_prompts_that_are_trained_on_are_left_out(compare, capsys, monkeypatch):
    monkeypatch.setattr(compare_methods, "compare", lambda args, comparison, prompts, versions: prompts)
    with pytest.raises(AssertionError):
        compare(('"a dog"', '"Picture  number 3"'))
    assert "1 of 6 prompts are trained on and left out, the first is 'Picture  number 3'" in capsys.readouterr().out


def stop_before(function, compare, *edits):
    def fail(*values):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compare_methods, function, fail)
        compare(*edits)


@pytest.mark.bad_input
def test_trainings_of_other_flags_are_not_mixed(compare, tmp_path):
    stop_before("draw", compare, ("seed = [0, 1]", "seed = 0"), ("steps = [1, 2]", "steps = [1]"))
    with pytest.raises(ValueError, match=r"\[rows.latent\]: learning_rate is 0.02, but was 0.01 for .*latent/seed-0"):
        compare(("learning_rate = 0.01", "learning_rate = 0.02"))


@pytest.mark.bad_input
def test_trainings_on_other_images_are_not_compared(compare, tmp_path):
    edits = ("seed = [0, 1]", "seed = 0"), ("steps = [1, 2]", "steps = [1]")
    stop_before("report", compare, *edits)
    (state,) = (tmp_path / "comparison/rows/latent").glob("*/checkpoint-1/training_state.json")
    edit_json(state, data={**json.loads(state.read_text())["data"], "images": "others"})
    with pytest.raises(
        ValueError, match="ncp-simpo/seed-0 cannot be compared with .*latent/seed-0: images changed between"
    ):
        compare(*edits)


@pytest.mark.bad_input
def test_a_page_of_the_user_is_not_replaced(compare, tmp_path):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison/index.html").write_text("mine")
    with pytest.raises(ValueError, match="--output_dir .*comparison holds index.html, which is not from this tool"):
        compare()
    assert (tmp_path / "comparison/index.html").read_text() == "mine"


def test_pictures_that_are_drawn_again_are_scored_again(compare, tmp_path):
    edits = ("seed = [0, 1]", "seed = 0"), ("steps = [1, 2]", "steps = [1]")
    stop_before("report", compare, *edits)
    (file,) = (tmp_path / "comparison/pictures/base").glob("scores.json")
    scores = json.loads(file.read_text())
    file.write_text(re.sub(r"\d+\.\d+", "0.5", file.read_text()))
    next(file.parent.glob("*.png")).unlink()
    stop_before("report", compare, *edits)
    assert json.loads(file.read_text()) == scores


def test_a_training_that_was_stopped_after_its_last_checkpoint_has_no_memory():
    records = {"whole": {"seconds": 2.0, "peak_memory": 5.0}, "stopped": {"seconds": 4.0}}
    comparison = SimpleNamespace(read_record=lambda training: records[training.seed])
    trainings = [SimpleNamespace(row="row", seed=seed) for seed in records]
    assert compare_methods.costs(comparison, trainings, "row") == (3.0, 5.0)
    assert compare_methods.costs(comparison, trainings[1:], "row") == (4.0, None)


FILES = sorted((ROOT / "docs" / "compare").glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_shipped_files_can_be_read(checkpoints, tmp_path, file):
    text = file.read_text(encoding="utf-8")
    kind = "sdxl" if "stable-diffusion-xl" in text else "sd15"
    for part, folder in (("model", checkpoints[kind]), ("vae_model", f"{checkpoints[kind]}/vae")):
        text = re.sub(rf"(?m)^(pretrained_{part}_name_or_path) = .*", rf'\1 = "{folder}"', text)
    (tmp_path / "rows.toml").write_text(text)
    plan = compare_methods.read_plan(tmp_path / "rows.toml")
    assert plan.script == f"train_ncp_dpo_{kind}.py" and len(plan.trainings) == len(plan.rows) * len(plan.seeds) > 2
    if hours := re.findall(r"training takes ([\d.]+) H100-hours", text):
        # A seed is N pairs for each row, at these pairs per second.
        flags = next(iter(plan.rows.values()))
        pairs = plan.steps[-1] * flags["train_batch_size"] * flags.get("gradient_accumulation_steps", 1)
        sentence = re.search(r"A seed is .*?pairs per second", text.replace("\n# ", " "))[0]
        number, *rates = (float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", sentence))
        assert number == pairs and len(rates) == len(plan.rows)
        seconds = len(plan.seeds) * sum(pairs / rate for rate in rates)
        assert [f"{seconds / 3600:.1f}"] == hours


CHILD = """
import sys, time
print("Steps:  50%|#####     | 1/2 [00:01<00:01]", flush=True)
time.sleep(60)
"""


def launch_forever(script, log):
    """What the tool does while a child works. Signals end it."""
    with compare_methods.stop_signals():
        compare_methods.launch(["--num_processes", "1", "--cpu"], script, ["x"], log, lambda share: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_children_end_with_the_tool(tmp_path, number):
    text = CHILD
    if number == signal.SIGKILL:
        text = (
            f"import sys; sys.path.append({str(ROOT / 'tools')!r}); import common; common.end_with_parent(True){CHILD}"
        )
    (tmp_path / "child.py").write_text(text)
    log = tmp_path / "log"
    tool = FORK_SERVER.Process(target=launch_forever, args=(str(tmp_path / "child.py"), log))
    tool.start()
    deadline = time.monotonic() + 200
    while not log.is_file() or compare_methods.find_progress(log, 0) != 0.5:
        assert time.monotonic() < deadline and tool.is_alive()
        time.sleep(0.2)
    children = psutil.Process(tool.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(tool.pid, number)
    tool.join(30)
    assert tool.exitcode == (128 + number if number == signal.SIGTERM else -number)
    assert not psutil.wait_procs(children, 30)[1]


def test_a_child_of_a_killed_run_is_waited_for(tmp_path, capsys):
    words = ["--output_dir", str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)", *words])
    elsewhere = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words], cwd=tmp_path)
    compare_methods.wait_for_earlier(words)
    assert child.poll() == 0 and elsewhere.poll() is None
    assert f"Waiting for process {child.pid}" in capsys.readouterr().err
    elsewhere.kill()
    elsewhere.wait()
