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

import math

import experiment
import judges
import pytest
import torch
from conftest import fails_on_amd
from scenes import SCENES, Explanations, gaussian_blur, render, reward


@fails_on_amd
def test_judges_are_the_reward_and_its_noise():
    scene = SCENES[7]
    pictures = render([scene] * 3, torch.Generator().manual_seed(0), well_drawn=1.0)
    pictures[2] = gaussian_blur(pictures[0], 2.0)
    images, prompts = experiment.to_pil(pictures), [scene.caption] * 3
    expected = reward(pictures, [scene] * 3, Explanations())
    for name, values in (("total", expected.total), ("match", expected.match)):
        # Pixels are rounded to 8 bits.
        assert getattr(judges, name)(images, prompts) == pytest.approx((values / judges.TEMPERATURE).tolist(), abs=0.1)
    drawing = judges.drawing(images, prompts)
    assert drawing[0] > drawing[2] + 1
    noisy = judges.noisy_total(images, prompts)
    assert noisy == judges.noisy_total(images, prompts) != judges.total(images, prompts)
    # Every judge has noise of its own.
    noise = [[a - b for a, b in zip(noisy, judges.total(images, prompts))]]
    noise.append([a - b for a, b in zip(judges.noisy_drawing(images, prompts), drawing)])
    assert noise[0] != pytest.approx(noise[1], abs=1e-3)
    with pytest.raises(ValueError):
        judges.total(images[:1], ["a cat"])


def test_noisy_judges_prefer_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(judges, "find_reward", lambda pixels, prompt: torch.tensor(0.1 if prompt == "good" else 0.05))

    class Image:
        def __init__(self, number):
            self.tobytes = str(number).encode

    images = list(map(Image, range(4000)))
    good, bad = (
        judges.judge(images[side::2], [name] * 2000, lambda r: r, "judge") for side, name in enumerate(("good", "bad"))
    )
    share = sum(a > b for a, b in zip(good, bad)) / 2000
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
