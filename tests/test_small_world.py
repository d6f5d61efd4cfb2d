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

import numpy as np
import pytest
import small_world
import torch
from scenes import SCENES

from diffusers import StableDiffusionPipeline


@pytest.fixture
def quick(monkeypatch):
    """A world with fewer pictures and shorter runs."""
    monkeypatch.setattr(small_world, "SCENES", SCENES[::12])
    monkeypatch.setattr(small_world, "NUM_TRAINING_SCENES", 16)
    monkeypatch.setattr(small_world, "PICTURES_PER_SCENE", 2)
    monkeypatch.setattr(small_world, "TEST_PICTURES_PER_SCENE", 1)
    monkeypatch.setattr(small_world, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(small_world, "STEPS", (2, 4))


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


def test_base_model_is_small_and_draws_what_it_is_told():
    files = [path for path in small_world.ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    pipeline = small_world.load_pipeline(small_world.ASSETS)
    assert isinstance(pipeline, StableDiffusionPipeline)
    explanations = small_world.Explanations()
    scenes = small_world.split_scenes()[2][:16]
    pictures = small_world.draw(pipeline, scenes, 0)
    right = small_world.reward(pictures, scenes, explanations).match.mean()
    wrong = small_world.reward(pictures, [*scenes[1:], scenes[0]], explanations).match.mean()
    assert right > wrong + 0.15
    # The noise of a picture is its own, whatever it is drawn together with.
    torch.testing.assert_close(small_world.draw(pipeline, scenes[3:5], 3), pictures[3:5], atol=1e-3, rtol=0)


def test_from_pairs_to_a_result(quick, tmp_path, capsys):
    small_world.main(small_world.parse_args(["pairs", "--folder", str(tmp_path)]))
    arguments = ["run", "dpo-ncp", "--learning_rate", "1e-3", "--folder", str(tmp_path)]
    small_world.main(small_world.parse_args(arguments))
    file = tmp_path / "runs" / "dpo-ncp-0.001-0" / "result.json"
    result = json.loads(file.read_text())
    assert result["test"].keys() == result["seconds"].keys() == {"2", "4"}
    assert len(result["test"]["4"]["total"]) == 2
    assert all(0 <= accuracy <= 1 for accuracy in result["implicit_accuracy"].values())

    # A result is not computed again.
    file.write_text(json.dumps({**result, "seconds": {"2": 7, "4": 7}}))
    small_world.main(small_world.parse_args(arguments))
    assert "7 s" in capsys.readouterr().out
