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
import random
import subprocess
import threading

import numpy as np
import pytest
import experiment as small_world
import report as small_world_report
import torch
from datasets import Dataset
from PIL import Image
from scenes import SCENES, reward

from diffusers import StableDiffusionPipeline


def train_base(folder, **options):
    """A base model that has seen three batches."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"NUM_PICTURES": 100, "VAE_STEPS": 3, "UNET_STEPS": 3, **options}.items():
            monkeypatch.setattr(small_world, name, value)
        small_world.train_base(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def quick(base, monkeypatch):
    """A world with fewer pictures and shorter runs."""
    monkeypatch.setattr(small_world, "ASSETS", base)
    monkeypatch.setattr(small_world, "SCENES", SCENES[::12])
    monkeypatch.setattr(small_world, "NUM_TRAINING_SCENES", 16)
    monkeypatch.setattr(small_world, "PICTURES_PER_SCENE", 2)
    monkeypatch.setattr(small_world, "TEST_PICTURES_PER_SCENE", 1)
    monkeypatch.setattr(small_world, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(small_world, "STEPS", (2, 4))
    monkeypatch.setattr(small_world, "LATENT_STEPS", (2, 4, 6))
    return base


def test_every_word_is_a_token():
    tokenizer = small_world.build_tokenizer()
    for scene in SCENES:
        words = scene.caption.split()
        assert tokenizer.convert_ids_to_tokens(tokenizer(scene.caption).input_ids)[1:-1] == [f"{w}</w>" for w in words]


def test_scenes_are_split():
    training, choosing, test = small_world.split_scenes()
    assert len(choosing) == len(test) == 40
    assert sorted([*training, *choosing, *test]) == sorted(SCENES)


def test_better_pictures_win_as_often_as_they_should():
    scenes = [SCENES[0]] * small_world.PICTURES_PER_SCENE
    rewards = torch.linspace(0, 0.2, len(scenes))
    counts = {pair: [] for pair in itertools.combinations(range(len(scenes)), 2)}
    rng = random.Random(0)
    for _ in range(2000):
        for row in small_world.compare(scenes, [b""] * len(scenes), rewards, rng):
            counts[int(row["image_0_uid"]), int(row["image_1_uid"])].append(row["label_0"])
    for (i, j), labels in counts.items():
        expected = torch.sigmoid((rewards[i] - rewards[j]) / small_world.TEMPERATURE).item()
        assert np.mean(labels) == pytest.approx(expected, abs=0.05)


def test_base_model_is_of_the_usual_kind(base):
    pipeline = small_world.load_pipeline(base)
    assert isinstance(pipeline, StableDiffusionPipeline)
    scenes = small_world.split_scenes()[2][:16]
    pictures = small_world.draw(pipeline, scenes, 0)
    # The noise of a picture is its own, whatever it is drawn together with.
    torch.testing.assert_close(small_world.draw(pipeline, scenes[3:5], 3), pictures[3:5], atol=1e-3, rtol=0)


def test_base_model_comes_from_a_seed(base, tmp_path):
    def contents(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert contents(train_base(tmp_path / "again")) == contents(base)
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (train_base(tmp_path / "other", SEED=1) / unet).read_bytes() != (base / unet).read_bytes()


def test_committed_base_model_draws_what_is_asked_for():
    pipeline, explanations = small_world.load_pipeline(small_world.ASSETS), small_world.Explanations()
    assert sum(path.stat().st_size for path in small_world.ASSETS.rglob("*") if path.is_file()) < 8e6
    asked, other = SCENES[:10], SCENES[120:130]
    pictures = small_world.draw(pipeline, asked, 0)
    assert (
        reward(pictures, asked, explanations).match.mean() > reward(pictures, other, explanations).match.mean() + 0.2
    )


def test_from_pairs_to_a_result(quick, tmp_path, capsys, monkeypatch):
    arguments = ["run", "dpo-ncp", "--learning_rate", "1e-3", "--folder", str(tmp_path)]
    small_world.main(small_world.parse_args(arguments))
    file = tmp_path / "runs" / "dpo-ncp-0.001-0" / "result.json"
    result = json.loads(file.read_text())
    assert result["test"].keys() == result["seconds"].keys() == {"2", "4"}
    assert len(result["test"]["4"]["total"]) == 2

    pipeline = small_world.load_pipeline(quick)
    rows = list(Dataset.from_parquet(str(tmp_path / "heldout" / "train.parquet")))
    turned = [{**row, "label_0": 1 - row["label_0"]} for row in rows]
    assert set(small_world.implicit_accuracy(pipeline, rows).values()) == {0.5}
    pipeline.load_lora_weights(file.parent)
    accuracies = small_world.implicit_accuracy(pipeline, rows)
    assert accuracies == pytest.approx(result["implicit_accuracy"])
    for space, accuracy in small_world.implicit_accuracy(pipeline, turned).items():
        assert accuracy == pytest.approx(1 - accuracies[space])

    # A result is not computed again, nor taken for that of another command.
    file.write_text(json.dumps({**result, "seconds": {"2": 7, "4": 7}}))
    small_world.main(small_world.parse_args(arguments))
    output = capsys.readouterr().out
    assert "seed 0, step 0, 0 s" in output and "seed 0, step 4, 7 s" in output
    file.write_text(json.dumps({**result, "command": "another"}))
    with pytest.raises(ValueError, match="is of another command: another"):
        small_world.main(small_world.parse_args(arguments))
    with pytest.raises(ValueError, match="holds runs on its pairs"):
        small_world.main(small_world.parse_args(["pairs", "--folder", str(tmp_path)]))
    # Nor are pairs and runs of another base or reward taken for those of this one.
    monkeypatch.setattr(small_world, "TEMPERATURE", 1.0)
    with pytest.raises(ValueError, match="holds pairs of another base model or another reward"):
        small_world.main(small_world.parse_args(arguments))


def test_pairs_that_were_interrupted_are_made_again(quick, tmp_path):
    small_world.make_pairs(tmp_path)
    first = (tmp_path / "heldout" / "train.parquet").read_bytes()
    (tmp_path / "heldout" / "train.parquet").unlink()
    small_world.make_pairs(tmp_path)
    assert (tmp_path / "heldout" / "train.parquet").read_bytes() == first


def outcome(method, seed, rewards, learning_rate=1e-3, seconds=10, choosing=0.5):
    """A result with the same rewards of every part, two pictures of one caption; `seconds` are those of a hundred steps."""
    steps = small_world.steps_of(method)
    return {
        "method": method,
        "seed": seed,
        "learning_rate": learning_rate,
        "seconds": {str(step): seconds * step / 100 for step in steps},
        "test": {
            str(step): dict.fromkeys(small_world_report.PARTS, [reward, reward])
            for step, reward in zip(steps, rewards)
        },
        "choosing": {"total": [choosing, choosing]},
        "implicit_accuracy": {"latent": 1, "ncp": 1},
    }


def test_learning_rate_is_chosen_on_other_captions_with_the_first_seed():
    results = [
        outcome("dpo-ncp", 0, (0.9, 0.9, 0.9), learning_rate=1e-3, choosing=0.4),
        outcome("dpo-ncp", 0, (0.1, 0.1, 0.1), learning_rate=3e-3, choosing=0.5),
        outcome("dpo-ncp", 1, (0.9, 0.9, 0.9), learning_rate=1e-3, choosing=0.9),
    ]
    assert small_world.best_learning_rate(results) == 3e-3


def test_all_runs_what_is_missing_and_reports(quick, tmp_path, monkeypatch):
    folder, output_dir = tmp_path / "world", tmp_path / "report"
    for module, name, value in [
        (small_world, "METHODS", {name: small_world.METHODS[name] for name in ("dpo-latent", "dpo-ncp")}),
        (small_world, "LEARNING_RATES", (1e-3,)),
        (small_world, "SEEDS", (0, 1)),
        (small_world_report, "DUELS", (("dpo-ncp", "dpo-latent"),)),
    ]:
        monkeypatch.setattr(module, name, value)
    run_process, launched, failing, lock = subprocess.run, [], ["dpo-ncp"], threading.Lock()

    def run_here(command, **options):
        """Of the world's own commands, so that the world is the quick one."""
        if command[1] == small_world_report.__file__:
            small_world_report.main(small_world_report.parse_args([*command[2:], "--output_dir", str(output_dir)]))
        elif command[1] != small_world.__file__:
            run_process(command, **options)
        elif command[3] not in failing:
            # Models cannot be loaded by two threads.
            with lock:
                launched.append(command[3])
                small_world.main(small_world.parse_args(command[2:]))

    monkeypatch.setattr(subprocess, "run", run_here)
    arguments = small_world.parse_args(["all", "--folder", str(folder)])
    with pytest.raises(RuntimeError, match=r"Runs failed, see .*dpo-ncp-0.001-0.log"):
        small_world.main(arguments)
    # Learning rates are not compared until all are there.
    assert launched == ["dpo-latent"]
    failing.clear()
    small_world.main(arguments)
    assert len(launched) == 4

    chosen, _ = small_world_report.load_results(folder)
    lines = (output_dir / "README.md").read_text().splitlines()
    for method, runs in chosen.items():
        mean = np.mean([run["test"]["4"]["total"] for run in runs])
        line = next(line for line in lines if line.startswith(f"| {method} |"))
        assert f"| {runs[0]['learning_rate']:g} (edge) | {mean:.3f} |" in line
    commands = (output_dir / "commands.txt").read_text().splitlines()
    assert len(commands) == 4 and sum("--loss_space latent" in command for command in commands) == 2
    for name in ("rewards.png", "pictures.png"):
        assert Image.open(output_dir / name).size > (500, 200)


def test_over_base_and_twin_at_equal_steps_and_time():
    base = {seed: dict.fromkeys(small_world_report.PARTS, [reward, reward]) for seed, reward in ((0, 0.4), (1, 0.2))}
    best = dict.fromkeys(small_world_report.PARTS, np.array([1.0]))
    chosen = {
        "dpo-latent": [outcome("dpo-latent", seed, (0.3, 0.4, 0.5, 0.7), seconds=5) for seed in (0, 1)],
        "dpo-ncp": [outcome("dpo-ncp", seed, (0.5, 0.5, last), seconds=7) for seed, last in ((0, 0.6), (1, 0.8))],
    }
    row = small_world_report.table(chosen, base, best).splitlines()[-1].split(" | ")
    assert row[2] == "0.700"
    assert row[6] == "+0.400 ± 0.283"  # 0.6 - 0.4 and 0.8 - 0.2
    assert row[8] == "+0.200 ± 0.141"  # 0.6 - 0.5 and 0.8 - 0.5
    # After 21 seconds the twin has made 420 steps: 0.66
    assert row[10] == "+0.040 ± 0.141"


def test_win_rate():
    # Two captions with two pictures each: 1 and a half of two are won. Drawing captions anew, both may be either.
    ours, theirs = [np.array([1.0, 2, 3, 4])], [np.array([0.0, 1, 3, 5])]
    assert small_world_report.win_rate(ours, theirs) == "62% (25% – 100%)"
    # As many captions with more pictures are no surer, nor are trainings that come out the same.
    assert small_world_report.win_rate(3 * ours, 3 * theirs) == "62% (25% – 100%)"


def test_win_rate_knows_that_trainings_differ():
    # Every caption is won by the pictures of one training, and lost by those of the other.
    ours, theirs = [np.ones(200), np.zeros(200)], [np.zeros(200), np.ones(200)]
    assert small_world_report.win_rate(ours, theirs) == "50% (0% – 100%)"
