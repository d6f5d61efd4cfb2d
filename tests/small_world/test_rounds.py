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


import json
from statistics import fmean, stdev

import experiment
import pytest
import rounds
from conftest import ROOT
from datasets import Dataset
from scenes import SCENES


@pytest.fixture
def quick(monkeypatch):
    """A world with fewer pictures and shorter runs; returns the options of the trainings that are run."""
    for module, name, value in [
        (experiment, "SCENES", SCENES[::24]),
        (experiment, "NUM_TRAINING_SCENES", 8),
        (rounds, "NUM_SCENES", 8),
        (experiment, "PICTURES_PER_SCENE", 2),
        (experiment, "NUM_INFERENCE_STEPS", 2),
        (rounds, "PICTURES_PER_CAPTION", 1),
        (rounds, "STEPS", 3),
        (rounds, "LEARNING_RATE", 0.1),
    ]:
        monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(ROOT)
    run_script, trained = experiment.run_script, []

    def run(module, options):
        if module is rounds.train_ncp_dpo_sd15:
            trained.append(options)
        run_script(module, options)

    monkeypatch.setattr(experiment, "run_script", run)
    return trained


def test_two_rounds(quick, tmp_path, monkeypatch):
    folder, output_dir = tmp_path / "world", tmp_path / "results"
    arguments = ["--folder", str(folder), "--output_dir", str(output_dir)]
    rounds.main(rounds.parse_args([*arguments, "--seed", "0"]))
    (result,) = json.loads((output_dir / "rounds.json").read_text())
    rewards = {name: values["reward"] for name, values in result["rewards"].items()}
    assert [len(values) for values in rewards.values()] == [1] * 4
    assert len({tuple(values) for values in rewards.values()}) == 4

    # Both second LoRAs start from the first, one with the first one's pictures of the same captions.
    first, second, control = quick
    assert "pretrained_lora_path" not in first
    assert second["pretrained_lora_path"] == control["pretrained_lora_path"] == first["output_dir"]
    assert first["encoded_data_dir"] == control["encoded_data_dir"] != second["encoded_data_dir"]
    old, new = (Dataset.from_parquet(str(path / "pairs/train.parquet")) for path in (folder, folder / "seed-0"))
    assert old["caption"] == new["caption"] and set(old["jpg_0"]).isdisjoint(new["jpg_0"])

    # What is there is not run again.
    (output_dir / "rounds.json").unlink()
    rounds.main(rounds.parse_args([*arguments, "--seed", "0"]))
    assert json.loads((output_dir / "rounds.json").read_text()) == [result] and len(quick) == 3

    monkeypatch.setattr(rounds, "LEARNING_RATE", 0.2)
    with pytest.raises(ValueError, match="seed-0/result.json has the settings .*0.1.*, not .*0.2"):
        rounds.main(rounds.parse_args([*arguments, "--seed", "0"]))


def test_report():
    base = {0: [0.1, 0.5], 1: [0.3, 0.3]}
    gains = {"base": 0, "round 1": 0.1, "round 2": 0.3, "control": 0.1}
    results = [
        {
            "rewards": {
                name: {"reward": [value + (1 + seed) * gain for value in base[seed]]} for name, gain in gains.items()
            }
        }
        for seed in base
    ]
    rows = [line.split(" | ") for line in rounds.describe(results).splitlines() if line.startswith("| round 2")]
    assert rows[0][1] == f"{fmean([0.6, 0.9]):.3f} ± {stdev([0.6, 0.9]) / 2**0.5:.3f} |"
    assert rows[2] == ["| round 2 over control", "+0.300 ± 0.100", "100% ± 0% |"]
    assert "| control over round 1 | +0.000 ± 0.000 | 50% ± 0% |" in rounds.describe(results)
