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

"""The small world's judges, for `--scorers small_world/judges.py:NAME` of the tools.

`total` is the true reward, `match` and `drawing` are parts of it, divided by `TEMPERATURE`: a difference of scores is the logit of
the probability to win. The noisy judges add noise to that, so that the better of two pictures wins as often as it says. The
noise is part of the picture's score. It is the same whenever the picture is scored.
"""

import functools
import hashlib
import math
import random

import numpy as np
import torch
from scenes import RESOLUTION, SCENES, Explanations, reward


TEMPERATURE = 0.05  # A picture whose reward is higher by 0.05 wins with a probability of 73 %.
explanations = functools.cache(Explanations)


@functools.lru_cache(maxsize=1000)
def find_reward(pixels, caption):
    """The `Reward` of a picture, given as the bytes of its RGB pixels. Several judges ask for the same picture."""
    pictures = torch.tensor(np.frombuffer(pixels, np.uint8)).view(1, RESOLUTION, RESOLUTION, 3).permute(0, 3, 1, 2)
    (scene,) = (scene for scene in SCENES if scene.caption == caption)
    return reward(pictures / 255, [scene], explanations())


def judge(images, prompts, part, name=None):
    """Scores of pictures. `part` gets the part of a `Reward` that counts. With a `name` there is noise, another for each name."""
    scores = []
    for image, prompt in zip(images, prompts):
        pixels = image.tobytes()
        scores.append(part(find_reward(pixels, prompt)).item() / TEMPERATURE)
        if name is not None:
            digest = hashlib.sha256(f"{name}\n{prompt}\n".encode() + pixels).digest()
            # The difference of two such numbers has the logistic distribution.
            scores[-1] -= math.log(-math.log(random.Random(digest).random()))
    return scores


def drawing_of(reward):
    return (reward.quality + reward.style) / 2


def total(images, prompts):
    return judge(images, prompts, lambda reward: reward.total)


def match(images, prompts):
    return judge(images, prompts, lambda reward: reward.match)


def drawing(images, prompts):
    return judge(images, prompts, drawing_of)


def noisy_total(images, prompts):
    return judge(images, prompts, lambda reward: reward.total, "total")


def noisy_drawing(images, prompts):
    return judge(images, prompts, drawing_of, "drawing")
