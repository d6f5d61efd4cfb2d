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
import os
import random
from concurrent.futures import ThreadPoolExecutor

import experiment
import numpy as np
import protocol
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
        for name, value in {"PICTURES_PER_SCENE": 2, "NUM_INFERENCE_STEPS": 2, "MEASURED_INFERENCE_STEPS": 2}.items():
            monkeypatch.setattr(experiment, name, value)
        for name, value in {
            "SCENES": SCENES[::12],
            "NUM_TRAINING_SCENES": 16,
            "PICTURES_PER_CAPTION": 1,
            "TEST_PICTURES_PER_CAPTION": 2,
            "STEPS": (1, 3),
            "MAX_STEPS": 4,
            "LEARNING_RATE": 1e-3,
            "FACTORS": (2,),
        }.items():
            monkeypatch.setattr(protocol, name, value)
        yield


@pytest.fixture(scope="module")
def world(quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    experiment.make_pairs(folder)
    return folder


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


def test_from_pairs_to_a_report(world, tmp_path, monkeypatch):
    methods = {name: protocol.METHODS[name] for name in ("dpo-latent", "sft-ncp", "dpo-ncp")}
    methods["sft-ncp"] = {**methods["sft-ncp"], "ncp_error_scale": 1000}
    monkeypatch.setattr(protocol, "METHODS", methods)
    file = tmp_path / "runs.jsonl"
    for method, num_seeds in (("dpo-latent", 2), ("sft-ncp", 1)):
        experiment.run_row(world, file, method, num_seeds)
    runs = protocol.load_runs(file)
    tested = [run for run in runs.values() if "test" in run]
    # The first settings, a learning rate and a beta beside them, and as many more as got better.
    assert sum("choosing" in run for run in runs.values() if run["method"] == "dpo-latent") >= 3
    assert "sft-ncp-0.001-0" in runs and len(tested) == 3
    for run in tested:
        # All steps are measured, the best one with more pictures.
        assert {"1", "3"} <= run["test"].keys() <= {"1", "3", "4"}
        assert sorted({len(rewards["total"]) for rewards in run["test"].values()}) == [2, 4]

    # A run in the file is not measured again, even if its LoRA has gone.
    before = file.read_bytes()
    (world / "runs").rename(tmp_path / "away")
    experiment.run_row(world, file, "dpo-latent", 2)
    assert file.read_bytes() == before
    (tmp_path / "away").rename(world / "runs")

    # An interrupted experiment goes on: a line that was cut short is made again.
    lost = list(protocol.load_runs(file).values())[-1]
    file.write_bytes(before[: before.rindex(b'"command"')])
    assert protocol.load_runs(file).get(lost["name"]) != lost
    experiment.run_row(world, file, "sft-ncp", 1)
    restored = protocol.load_runs(file)
    assert restored.keys() == runs.keys() and restored[lost["name"]]["test"] == lost["test"]

    experiment.measure_references(world, file)
    report.main(report.parse_args(["--output_dir", str(tmp_path)]))
    text = (tmp_path / "README.md").read_text()
    assert "Not measured: dpo-ncp." in text
    rewards = [
        np.mean(max(run["test"].values(), key=lambda r: len(r["total"]))["total"])
        for run in tested
        if run["method"] == "dpo-latent"
    ]
    line = next(line for line in text.splitlines() if line.startswith("| dpo-latent | 2 |"))
    assert f"| {np.mean(rewards):.3f} (" in line
    assert Image.open(tmp_path / "rewards.png").size > (500, 200)

    sft = restored["sft-ncp-0.001-0"]
    protocol.append_run(file, {**sft, "command": "another"})
    with pytest.raises(ValueError, match=rf"{file} .*sft-ncp-0.001-0 .*another.*--output_dir"):
        experiment.run_row(world, file, "sft-ncp", 1)


def test_a_folder_with_a_base_of_its_own(quick, tmp_path):
    train_base(tmp_path / "base", "strong")
    experiment.make_pairs(tmp_path)
    with pytest.raises(ValueError, match=f"--folder {tmp_path}"):
        (tmp_path / "base").rename(tmp_path / "away")
        experiment.check_world(tmp_path)
    (tmp_path / "away").rename(tmp_path / "base")
    run = experiment.run(tmp_path, tmp_path / "runs.jsonl", "dpo-ncp", 1e-3, 200, 0, (1,), 1)
    base_name = os.path.relpath(tmp_path / "base", experiment.ROOT)
    assert f"--pretrained_model_name_or_path {base_name} " in run["command"]
    lora = load_file(tmp_path / "runs" / run["name"] / experiment.trainer.WEIGHTS_NAME)
    assert {weight.shape[1] for name, weight in lora.items() if "lora.down" in name} == {96, 128}
    assert len(run["test"]["1"]["total"]) == 2 * len(experiment.measured_scenes("test"))


def test_pairs_are_labelled_anew_by_other_rewards(world):
    uids = Dataset.from_parquet(str(world / "pairs" / "train.parquet"))
    rewards = torch.arange(16.0 * experiment.PICTURES_PER_SCENE)
    for name, values in (("later", rewards), ("earlier", -rewards)):
        experiment.label_anew(world, name, values)
        rows = Dataset.from_parquet(str(world / name / "train.parquet"))
        assert rows["jpg_0"][:] == uids["jpg_0"][:]
        for row in rows:
            assert row["label_0"] == (values[int(row["image_0_uid"])] > values[int(row["image_1_uid"])])


def test_pairs_and_runs_are_of_one_world(world, monkeypatch):
    (world / "runs").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=f"--folder {world} .*runs"):
        experiment.main(experiment.parse_args(["pairs", "--folder", str(world)]))
    monkeypatch.setattr(experiment, "TEMPERATURE", 1.0)
    with pytest.raises(ValueError, match=f"--folder {world} .*base model"):
        experiment.main(experiment.parse_args(["run", "dpo-ncp", "--folder", str(world)]))


def test_all_runs_what_it_can_and_names_what_failed(tmp_path, monkeypatch):
    seen = []

    def run_row(folder, runs_file, method, num_seeds):
        seen.append((method, num_seeds))
        if method == "dpo-ncp":
            raise ValueError("there are no pairs")

    monkeypatch.setattr(protocol, "METHODS", {"dpo-latent": {}, "dpo-ncp": {}, "dpo-ncp-down": {}})
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", lambda workers, *options: ThreadPoolExecutor(workers))
    monkeypatch.setattr(experiment, "run_row", run_row)
    with pytest.raises(RuntimeError, match="dpo-ncp.*there are no pairs"):
        experiment.run_all(tmp_path, tmp_path / "runs.jsonl", 1)
    # All rows with a few seeds come before any with more.
    assert seen == [
        *(("dpo-latent", 3), ("dpo-ncp", 3), ("dpo-ncp-down", 3)),
        *(("dpo-latent", 5), ("dpo-ncp", 5), ("dpo-ncp-down", 3)),
    ]
