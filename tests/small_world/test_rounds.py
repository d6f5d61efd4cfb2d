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

import experiment
import protocol
import pytest
import rounds
from datasets import Dataset
from safetensors.torch import load_file
from scenes import SCENES


@pytest.fixture
def trained(monkeypatch):
    """Makes the world smaller and runs shorter. Returns the options of the trainings that are run."""
    for module, name, value in [
        (protocol, "SCENES", SCENES[::24]),
        (protocol, "NUM_TRAINING_SCENES", 8),
        (protocol, "PICTURES_PER_CAPTION", 1),
        (rounds, "NUM_SCENES", 8),
        (rounds, "STEPS", 3),
        (rounds, "LEARNING_RATE", 0.1),
        (experiment, "PICTURES_PER_SCENE", 2),
        (experiment, "NUM_INFERENCE_STEPS", 2),
        (experiment, "MEASURED_INFERENCE_STEPS", 2),
    ]:
        monkeypatch.setattr(module, name, value)
    train, seen = experiment.train, []

    def record(options):
        seen.append(options)
        return train(options)

    monkeypatch.setattr(experiment, "train", record)
    return seen


def test_three_rounds(trained, tmp_path, monkeypatch):
    folder, output_dir = tmp_path / "world", tmp_path / "results"
    args = rounds.parse_args(["--folder", str(folder), "--output_dir", str(output_dir), "--seed", "0"])
    rounds.main(args)
    (result,) = protocol.load_runs(output_dir / "rounds.jsonl").values()
    assert {name: len(measured["total"]) for name, measured in result["rewards"].items()} == dict.fromkeys(
        ("base", "round 1", "round 2", "control 2", "round 3", "control 3"), 1
    )
    assert len({tuple(measured["total"]) for measured in result["rewards"].values()}) == 6
    assert "| round 3 | control 3 |" in (output_dir / "rounds.md").read_text()

    # Every later LoRA starts from the one before.
    options = {training["output_dir"].name: training for training in trained}
    first = {name: training.get("pretrained_lora_path") for name, training in options.items()}
    last = {name: training["output_dir"] / "checkpoint-3" for name, training in options.items()}
    assert first == {
        "round-1": None,
        "round-2": last["round-1"],
        "control-2": last["round-1"],
        "round-3": last["round-2"],
        "control-3": last["control-2"],
    }
    for name, path in last.items():
        weights = load_file(path / experiment.trainer.WEIGHTS_NAME)
        assert {len(weight) for key, weight in weights.items() if "lora.down" in key} == {16}
        if first[name] is not None:
            before = load_file(first[name] / experiment.trainer.WEIGHTS_NAME)
            assert weights.keys() == before.keys()
            assert any(not weight.equal(before[key]) for key, weight in weights.items())

    # The rounds have other pictures of the same captions, and the controls have those of round 1.
    sources = {name: training["encoded_data_dir"].parent for name, training in options.items()}
    assert sources["round-1"] == sources["control-2"] == sources["control-3"] == folder
    pairs = [Dataset.from_parquet(str(sources[f"round-{number}"] / "pairs/train.parquet")) for number in (1, 2, 3)]
    assert pairs[0]["caption"][:] == pairs[1]["caption"][:] == pairs[2]["caption"][:]
    pictures = [set(each["jpg_0"][:]) for each in pairs]
    assert len(set.union(*pictures)) == sum(map(len, pictures))

    # A seed in the results is not run again.
    rounds.main(args)
    assert len(trained) == 5
    monkeypatch.setattr(rounds, "LEARNING_RATE", 0.2)
    with pytest.raises(ValueError, match=rf"{output_dir}/rounds.jsonl: seed-0 .*0\.1.*0\.2"):
        rounds.main(args)
