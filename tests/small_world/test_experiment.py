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


import itertools
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import experiment
import numpy as np
import pytest
import report
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from scenes import SCENES
from test_base import train_base


@pytest.fixture(scope="module")
def quick():
    """A world with fewer pictures and shorter runs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {
            "SCENES": SCENES[::12],
            "NUM_TRAINING_SCENES": 16,
            "PICTURES_PER_SCENE": 2,
            "NUM_INFERENCE_STEPS": 2,
            "MEASURED_INFERENCE_STEPS": 2,
            "PICTURES_PER_CAPTION": 1,
            "TEST_PICTURES_PER_CAPTION": 2,
            "STEPS": (1, 3),
            "MAX_STEPS": 4,
            "LEARNING_RATE": 1e-3,
            "FACTORS": (2,),
        }.items():
            monkeypatch.setattr(experiment, name, value)
        yield


@pytest.fixture(scope="module")
def world(quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    experiment.make_pairs(folder)
    return folder


def test_scenes_are_split():
    training, choosing, test = experiment.split_scenes()
    assert len(choosing) == len(test) == 40
    assert sorted([*training, *choosing, *test]) == sorted(SCENES)


def test_better_pictures_win_as_often_as_they_should():
    scenes = [SCENES[0]] * experiment.PICTURES_PER_SCENE
    rewards = torch.linspace(0, 0.2, len(scenes))
    counts = {pair: [] for pair in itertools.combinations(range(len(scenes)), 2)}
    rng = random.Random(0)
    for _ in range(2000):
        for row in experiment.compare(scenes, [b""] * len(scenes), rewards, rng):
            counts[int(row["image_0_uid"]), int(row["image_1_uid"])].append(row["label_0"])
    for (i, j), labels in counts.items():
        expected = torch.sigmoid((rewards[i] - rewards[j]) / experiment.TEMPERATURE).item()
        assert np.mean(labels) == pytest.approx(expected, abs=0.05)


def tried(table, method="dpo-latent"):
    """`choose` where runs are as good as `table` says, and the settings that it tried."""
    seen = []

    def load(rate, beta, steps):
        seen.append((rate, beta))
        rewards = np.broadcast_to(table[rate, beta], max(len(steps), np.size(table[rate, beta])))
        return {"choosing": {str(step): {"total": [value]} for step, value in zip(steps, rewards)}}

    return experiment.choose(method, load), set(seen)


def test_settings_are_changed_in_turn_as_long_as_that_is_better():
    # The best step counts; downwards where upwards is worse.
    steps = experiment.STEPS
    table = {(5e-4, 200): (0.1, 0.2, 0.3), (1e-3, 200): (0.2, 0.5, 0.1), (2e-3, 200): (0.4, 0.1, 0.1)}
    table |= {(1e-3, 400): 0.4, (1e-3, 100): (0.6, 0.1, 0.1), (1e-3, 50): 0.5, (2e-3, 100): 0.1, (5e-4, 100): 0.6}
    assert tried(table) == ((1e-3, 100, steps, steps[0]), table.keys())
    # What beta is best decides which learning rate is.
    table = {
        (5e-4, 200): 0.3,
        (1e-3, 200): 0.2,
        (2.5e-4, 200): 0.2,
        (5e-4, 400): 0.4,
        (5e-4, 800): 0.2,
        (1e-3, 400): 0.5,
    }
    table |= {(2e-3, 400): 0.1, (1e-3, 800): 0.4}
    assert tried(table) == ((1e-3, 400, steps, steps[0]), {*table, (1e-3, 200)})
    # Without beta there is none to be changed.
    table = {(5e-4, None): 0.3, (1e-3, None): 0.2, (2.5e-4, None): 0.4, (1.25e-4, None): 0.2}
    assert tried(table, "sft-latent") == ((2.5e-4, None, steps, steps[0]), table.keys())


def test_a_method_is_trained_on_while_its_last_step_is_its_best():
    others = dict.fromkeys([(1e-3, 200), (2.5e-4, 200), (5e-4, 400), (5e-4, 100)], 0.2)
    table = {**others, (5e-4, 200): (0.1, 0.2, 0.3, 0.4, 0.1, 0.9)}
    assert tried(table)[0] == (5e-4, 200, (75, 150, 225, 300, 375), 300)
    # Nowhere beyond the most steps, nor where the first steps are as good.
    assert tried({**others, (5e-4, 200): np.arange(6) + 0.3})[0] == (5e-4, 200, (75, 150, 225, 300, 375, 450), 450)
    assert tried({**others, (5e-4, 200): 0.3})[0] == (5e-4, 200, (75, 150, 225), 75)


@pytest.mark.parametrize("part", ["match", "drawing"])
def test_pairs_labelled_by_one_part_of_the_reward_choose_by_it(part):
    def load(rate, beta, steps):
        # A higher learning rate is better for the match, and a lower one for everything else, to a limit.
        drawing = -max(rate, 1.25e-4)
        measured = {"match": min(rate, 8e-3), "quality": drawing, "style": drawing, "total": [drawing]}
        return {"choosing": {str(step): measured for step in steps}}

    rate, *_ = experiment.choose(f"dpo-ncp-by-{part}", load)
    assert rate == pytest.approx({"match": 8e-3, "drawing": 1.25e-4}[part])


def test_from_pairs_to_a_report(world, tmp_path, monkeypatch, capsys):
    for name, value in [
        ("METHODS", {name: experiment.METHODS[name] for name in ("dpo-latent", "sft-ncp", "dpo-ncp")}),
        ("NUM_SEEDS", {"dpo-latent": 2, "sft-ncp": 1}),
    ]:
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setitem(experiment.METHODS, "sft-ncp", {**experiment.METHODS["sft-ncp"], "ncp_error_scale": 1000})
    runs = tmp_path / "runs"
    for method in ("dpo-latent", "sft-ncp"):
        experiment.run_row(world, runs, method, experiment.NUM_SEEDS[method])
    results = {file.name: json.loads(file.read_text()) for file in runs.iterdir()}
    tested = [result for result in results.values() if "test" in result]
    # The first settings, a learning rate and a beta beside them, and as many more as got better.
    assert sum("choosing" in run for run in results.values() if run["method"] == "dpo-latent") >= 3
    assert "sft-ncp-0.001-0.json" in results and len(tested) == 3
    for result in tested:
        # At all steps, and of the best of them more.
        assert {"1", "3"} <= result["test"].keys() <= {"1", "3", "4"}
        assert sorted({len(rewards["total"]) for rewards in result["test"].values()}) == [2, 4]

    # What is there is not measured again, even if its LoRA has gone, nor taken for that of another command.
    before = {file: file.stat().st_mtime_ns for file in runs.iterdir()}
    (world / "runs").rename(tmp_path / "away")
    experiment.run_row(world, runs, "dpo-latent", 2)
    assert before == {file: file.stat().st_mtime_ns for file in runs.iterdir()}
    (tmp_path / "away").rename(world / "runs")

    experiment.measure_references(world, runs)
    report.main(report.parse_args(["--output_dir", str(tmp_path)]))
    text = (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out == text + "\n" and "Not complete yet: dpo-ncp." in text
    rewards = [np.mean(max(run["test"].values(), key=lambda r: len(r["total"]))["total"]) for run in tested]
    chosen = [run["method"] == "dpo-latent" for run in tested]
    line = next(line for line in text.splitlines() if line.startswith("| dpo-latent | 2 |"))
    assert f"| {np.mean(np.array(rewards)[chosen]):.3f} ± " in line
    assert Image.open(tmp_path / "rewards.png").size > (500, 200)

    file = next(file for file in runs.iterdir() if file.name.startswith("sft-ncp"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "command": "another"}))
    with pytest.raises(ValueError, match="is of another command: another"):
        experiment.run_row(world, runs, "sft-ncp", 1)


def test_a_folder_with_a_base_of_its_own(quick, tmp_path):
    train_base(tmp_path / "base", "strong")
    experiment.make_pairs(tmp_path)
    with pytest.raises(ValueError, match="holds pairs of another base model"):
        (tmp_path / "base").rename(tmp_path / "away")
        experiment.check_world(tmp_path)
    (tmp_path / "away").rename(tmp_path / "base")
    experiment.run(tmp_path, tmp_path, "dpo-ncp", 1e-3, 200, 0, (1,), 1)
    result = json.loads((tmp_path / "dpo-ncp-0.001-200-0.json").read_text())
    base_name = os.path.relpath(tmp_path / "base", experiment.ROOT)
    assert f"--pretrained_model_name_or_path {base_name} " in result["command"]
    lora = load_file(tmp_path / "runs" / "dpo-ncp-0.001-200-0" / experiment.trainer.WEIGHTS_NAME)
    assert {weight.shape[1] for name, weight in lora.items() if "lora.down" in name} == {96, 128}
    assert len(result["test"]["1"]["total"]) == 2 * len(experiment.measured_scenes("test"))


def test_pairs_are_labelled_anew_by_other_rewards(world):
    uids = Dataset.from_parquet(str(world / "pairs" / "train.parquet"))
    rewards = torch.arange(16.0 * experiment.PICTURES_PER_SCENE)
    for name, values in (("later", rewards), ("earlier", -rewards)):
        experiment.label_anew(world, name, values)
        rows = Dataset.from_parquet(str(world / name / "train.parquet"))
        assert rows["jpg_0"][:] == uids["jpg_0"][:]
        for row in rows:
            assert row["label_0"] == (values[int(row["image_0_uid"])] > values[int(row["image_1_uid"])])


def test_a_sum_of_both_errors(world, tmp_path, monkeypatch):
    seen = []

    def measure_sum(measure_errors, args, denoising, unet, policy, perception, *others, **options):
        inputs = args, denoising, unet, policy
        both = experiment.measure_sum(measure_errors, *inputs, perception, *others, **options)
        halves = [measure_errors(*inputs, p, *others, **options) for p in (None, perception)]
        seen.append([errors.policy.detach() for errors in (both, *halves)])
        return both

    monkeypatch.setitem(experiment.REPLACED, "dpo-sum", ("measure_errors", measure_sum))
    experiment.run(world, tmp_path, "dpo-sum", 1e-3, 200, 1, (1,), 1)
    ((both, latent, ncp),) = seen
    torch.testing.assert_close(both, (latent + ncp) / 2)
    assert latent.mean() / 10 < ncp.mean() < 10 * latent.mean()


def test_the_base_sees_a_picture_through_inverted_noise(world, tmp_path, monkeypatch):
    seen = []

    def invert(noise_batch, args, batch, pipeline, noise_scheduler):
        inputs = args, batch, pipeline, noise_scheduler
        both = [experiment.invert(noise_batch, *inputs), noise_batch(*inputs)]
        noisy_latents = noise_scheduler.add_noise(batch["latents"].float(), both[0].target, both[0].timesteps)
        torch.testing.assert_close(both[0].noisy_latents, noisy_latents)
        seen.append([(d.predict_reference(pipeline.unet) - d.target).square().mean() for d in both])
        return both[0]

    monkeypatch.setitem(experiment.REPLACED, "dpo-latent-inverted", ("noise_batch", invert))
    experiment.run(world, tmp_path, "dpo-latent-inverted", 1e-3, 200, 1, (1,), 1)
    ((inverted, by_chance),) = seen
    assert inverted < by_chance / 2


def test_training_leaves_no_trace(world, tmp_path):
    first, again = (tmp_path / name for name in ("first", "again"))
    for output_dir in (first, again):
        settings = "dpo-latent", 1e-3, 200, 0, (1,)
        events = experiment.train(experiment.training_options(world, output_dir, *settings))
        assert len(events.Scalars("loss")) == 1
    first, again = (load_file(folder / experiment.trainer.WEIGHTS_NAME) for folder in (first, again))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_pairs_and_runs_are_of_one_world(world, monkeypatch):
    (world / "runs").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="holds runs on its pairs"):
        experiment.main(experiment.parse_args(["pairs", "--folder", str(world)]))
    monkeypatch.setattr(experiment, "TEMPERATURE", 1.0)
    with pytest.raises(ValueError, match="holds pairs of another base model, reward or encoding"):
        experiment.main(experiment.parse_args(["run", "dpo-ncp", "--folder", str(world)]))


def test_all_runs_what_it_can_and_names_what_failed(tmp_path, monkeypatch):
    seen = []

    def run_row(folder, results, method, num_seeds):
        seen.append((method, num_seeds))
        if method == "dpo-ncp":
            raise ValueError("there are no pairs")

    for name, value in {
        "METHODS": {"dpo-latent": {}, "dpo-ncp": {}, "dpo-ncp-down": {}},
        "ProcessPoolExecutor": lambda num_workers, *options: ThreadPoolExecutor(num_workers),
        "run_row": run_row,
    }.items():
        monkeypatch.setattr(experiment, name, value)
    with pytest.raises(RuntimeError, match="Rows failed; .*dpo-ncp.*there are no pairs"):
        experiment.run_all(tmp_path, tmp_path, 1)
    # All rows with a few seeds come before any with more.
    assert seen == [("dpo-latent", 3), ("dpo-ncp", 3), ("dpo-ncp-down", 3)] + [
        ("dpo-latent", 5),
        ("dpo-ncp", 5),
        ("dpo-ncp-down", 3),
    ]
