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


import argparse
import itertools
import json
import random

import numpy as np
import pytest
import small_world
import small_world_report
import torch
from datasets import Dataset
from PIL import Image
from scenes import SCENES, reward

from diffusers import StableDiffusionPipeline


def train_base(folder, **options):
    """A base model that has seen three batches."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"NUM_PICTURES": 1000, "VAE_STEPS": 3, "UNET_STEPS": 3, **options}.items():
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
    def unet(folder):
        return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    assert unet(train_base(tmp_path / "again")) == unet(base)
    assert unet(train_base(tmp_path / "other", SEED=1)) != unet(base)


def test_committed_base_model_draws_what_is_asked_for():
    pipeline, explanations = small_world.load_pipeline(small_world.ASSETS), small_world.Explanations()
    assert sum(path.stat().st_size for path in small_world.ASSETS.rglob("*") if path.is_file()) < 8e6
    asked, other = SCENES[:10], SCENES[120:130]
    pictures = small_world.draw(pipeline, asked, 0)
    assert (
        reward(pictures, asked, explanations).match.mean() > reward(pictures, other, explanations).match.mean() + 0.2
    )


def test_from_pairs_to_a_result(quick, tmp_path, capsys):
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
    assert "step 4, 7 s" in capsys.readouterr().out
    file.write_text(json.dumps({**result, "command": "another"}))
    with pytest.raises(ValueError, match="is of another command: another"):
        small_world.main(small_world.parse_args(arguments))
    with pytest.raises(ValueError, match="holds runs on its pairs"):
        small_world.main(small_world.parse_args(["pairs", "--folder", str(tmp_path)]))


def test_pairs_that_were_interrupted_are_made_again(quick, tmp_path):
    small_world.make_pairs(tmp_path)
    first = (tmp_path / "heldout" / "train.parquet").read_bytes()
    (tmp_path / "heldout" / "train.parquet").unlink()
    small_world.make_pairs(tmp_path)
    assert (tmp_path / "heldout" / "train.parquet").read_bytes() == first


def outcome(method, seed, rewards, learning_rate=1e-3, seconds=10, choosing=0.5):
    """A result with the same rewards of every part after every hundred steps, two pictures a caption."""
    return {
        "method": method,
        "seed": seed,
        "learning_rate": learning_rate,
        "seconds": {str(step): seconds * step / 100 for step in small_world.STEPS},
        "test": {
            str(step): dict.fromkeys(small_world_report.PARTS, [reward, reward])
            for step, reward in zip(small_world.STEPS, rewards)
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


def test_report(quick, tmp_path):
    world = tmp_path / "world"
    small_world.make_pairs(world)
    rewards = {}
    for method in ("dpo-latent", "dpo-ncp"):
        result = small_world.run(world, method, 1e-3, 0)
        rewards[method] = np.mean(result["test"]["4"]["total"])
    small_world_report.main(argparse.Namespace(folder=world, output_dir=tmp_path / "report"))
    lines = (tmp_path / "report" / "README.md").read_text().splitlines()
    for name, mean in rewards.items():
        line, _ = (line for line in lines if line.startswith(f"| {name} |"))
        assert f"| {mean:.3f} |" in line
    assert sum("--loss_space latent" in line for line in open(tmp_path / "report" / "commands.txt")) == 1
    for name in ("rewards.png", "pictures.png"):
        assert Image.open(tmp_path / "report" / name).size > (500, 200)


def test_reward_at_equal_time():
    base = {0: dict.fromkeys(small_world_report.PARTS, [0.4, 0.6])}
    chosen = {
        "dpo-latent": [outcome("dpo-latent", 0, (0.6, 0.8, 0.9), seconds=5)],
        "dpo-ncp": [outcome("dpo-ncp", 0, (0.6, 0.8, 0.9), seconds=10)],
    }
    table = small_world_report.table(chosen, base)
    # Half way between the first and the second hundred steps
    assert table.splitlines()[-1].split(" | ")[8] == "0.700"


def test_duels_are_between_runs_of_one_seed():
    chosen = {
        "dpo-ncp": [outcome("dpo-ncp", seed, (0, 0, 0.5)) for seed in (0, 1, 2)],
        "dpo-ncp-scale-1": [outcome("dpo-ncp-scale-1", seed, (0, 0, reward)) for seed, reward in ((2, 0.4), (0, 0.6))],
    }
    assert small_world_report.duels(chosen).splitlines()[2:] == ["| dpo-ncp | dpo-ncp-scale-1 | 50% (50% – 50%) |"]


def test_win_rate():
    # Two captions with two pictures each: 1 and a half of two are won. Drawing captions anew, both may be either.
    ours, theirs = [np.array([1.0, 2, 3, 4])], [np.array([0.0, 1, 3, 5])]
    assert small_world_report.win_rate(ours, theirs) == "62% (25% – 100%)"
    # As many captions with more pictures are no surer.
    assert small_world_report.win_rate(3 * ours, 3 * theirs) == "62% (25% – 100%)"
