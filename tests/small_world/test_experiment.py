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

import experiment
import numpy as np
import pytest
import report
import torch
from datasets import Dataset
from PIL import Image
from scenes import SCENES


@pytest.fixture
def quick(monkeypatch):
    """A world with fewer pictures and shorter runs."""
    monkeypatch.setattr(experiment, "SCENES", SCENES[::12])
    monkeypatch.setattr(experiment, "NUM_TRAINING_SCENES", 16)
    monkeypatch.setattr(experiment, "PICTURES_PER_SCENE", 2)
    monkeypatch.setattr(experiment, "TEST_PICTURES_PER_SCENE", 1)
    monkeypatch.setattr(experiment, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(experiment, "STEPS", (2, 4))
    monkeypatch.setattr(experiment, "LATENT_STEPS", (2, 4, 6))


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


def test_from_pairs_to_a_result(quick, tmp_path, capsys, monkeypatch):
    arguments = ["run", "dpo-ncp", "--learning_rate", "1e-3", "--folder", str(tmp_path)]
    experiment.main(experiment.parse_args(arguments))
    file = tmp_path / "runs" / "dpo-ncp-0.001-0" / "result.json"
    result = json.loads(file.read_text())
    assert result["test"].keys() == result["seconds"].keys() == {"2", "4"}
    assert len(result["test"]["4"]["total"]) == 2

    pipeline = experiment.load_pipeline(experiment.ASSETS)
    rows = list(Dataset.from_parquet(str(tmp_path / "heldout" / "train.parquet")))
    turned = [{**row, "label_0": 1 - row["label_0"]} for row in rows]
    assert set(experiment.implicit_accuracy(pipeline, rows).values()) == {0.5}
    pipeline.load_lora_weights(file.parent)
    accuracies = experiment.implicit_accuracy(pipeline, rows)
    assert accuracies == pytest.approx(result["implicit_accuracy"])
    for space, accuracy in experiment.implicit_accuracy(pipeline, turned).items():
        assert accuracy == pytest.approx(1 - accuracies[space])

    # A result is not computed again, nor taken for that of another command.
    file.write_text(json.dumps({**result, "seconds": {"2": 7, "4": 7}}))
    experiment.main(experiment.parse_args(arguments))
    output = capsys.readouterr().out
    assert "seed 0, step 0, 0 s" in output and "seed 0, step 4, 7 s" in output
    file.write_text(json.dumps({**result, "command": "another"}))
    with pytest.raises(ValueError, match="is of another command: another"):
        experiment.main(experiment.parse_args(arguments))
    with pytest.raises(ValueError, match="holds runs on its pairs"):
        experiment.main(experiment.parse_args(["pairs", "--folder", str(tmp_path)]))
    # Nor are pairs and runs of another base or reward taken for those of this one.
    monkeypatch.setattr(experiment, "TEMPERATURE", 1.0)
    with pytest.raises(ValueError, match="holds pairs of another base model, reward or encoding"):
        experiment.main(experiment.parse_args(arguments))


def test_pairs_that_were_interrupted_are_made_again(quick, tmp_path):
    experiment.make_pairs(tmp_path)
    first = (tmp_path / "heldout" / "train.parquet").read_bytes()
    (tmp_path / "heldout" / "train.parquet").unlink()
    experiment.make_pairs(tmp_path)
    assert (tmp_path / "heldout" / "train.parquet").read_bytes() == first


def test_learning_rate_is_chosen_on_other_captions_with_the_first_seed():
    runs = [
        {"seed": seed, "learning_rate": learning_rate, "choosing": {"total": [total, total]}}
        for seed, learning_rate, total in ((0, 1e-3, 0.4), (0, 3e-3, 0.5), (1, 1e-3, 0.9))
    ]
    assert experiment.best_learning_rate(runs) == 3e-3


def test_all_runs_what_is_missing_and_reports(quick, tmp_path, monkeypatch):
    folder, output_dir = tmp_path / "world", tmp_path / "report"
    for module, name, value in [
        (experiment, "METHODS", {name: experiment.METHODS[name] for name in ("dpo-latent", "dpo-ncp")}),
        (experiment, "LEARNING_RATES", (1e-3,)),
        (experiment, "SEEDS", (0, 1)),
        (report, "DUELS", (("dpo-ncp", "dpo-latent"),)),
    ]:
        monkeypatch.setattr(module, name, value)
    run_process, launched, failing, lock = subprocess.run, [], ["dpo-ncp"], threading.Lock()

    def run_here(command, **options):
        """Of the world's own commands, so that the world is the quick one."""
        if command[1] == report.__file__:
            report.main(report.parse_args([*command[2:], "--output_dir", str(output_dir)]))
        elif command[1] != experiment.__file__:
            run_process(command, **options)
        elif command[3] not in failing:
            # Models cannot be loaded by two threads.
            with lock:
                launched.append(command[3])
                experiment.main(experiment.parse_args(command[2:]))

    monkeypatch.setattr(subprocess, "run", run_here)
    arguments = experiment.parse_args(["all", "--folder", str(folder)])
    with pytest.raises(RuntimeError, match=r"Runs failed, see .*dpo-ncp-0.001-0.log"):
        experiment.main(arguments)
    # Learning rates are not compared until all are there.
    assert launched == ["dpo-latent"]
    failing.clear()
    experiment.main(arguments)
    assert len(launched) == 4

    chosen, _ = report.load_results(folder)
    lines = (output_dir / "README.md").read_text().splitlines()
    for method, runs in chosen.items():
        mean = np.mean([run["test"]["4"]["total"] for run in runs])
        line = next(line for line in lines if line.startswith(f"| {method} |"))
        assert f"| {runs[0]['learning_rate']:g} (edge) | {mean:.3f} |" in line
    commands = (output_dir / "commands.txt").read_text().splitlines()
    assert len(commands) == 4 and sum("--loss_space latent" in command for command in commands) == 2
    for name in ("rewards.png", "pictures.png"):
        assert Image.open(output_dir / name).size > (500, 200)
