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


import pytest
import scenes
import torch
from scenes import SCENES, Explanations, Scene, gaussian_blur, render, reward


@pytest.fixture(scope="module")
def explanations():
    return Explanations()


@pytest.fixture(scope="module")
def well_drawn():
    """Every tenth scene and a picture of it."""
    return SCENES[::10], render(SCENES[::10], torch.Generator().manual_seed(0), well_drawn=1.0)


def test_captions_tell_scenes_apart():
    assert len({scene.caption for scene in SCENES}) == len(SCENES) == 2 * 6 * 4 * 5
    assert Scene("small", "red", "circle", "blue").caption == "a small red circle on blue"


def test_pictures_are_reproducible():
    first, second, other = (render(SCENES[:20], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (20, 3, scenes.RESOLUTION, scenes.RESOLUTION)
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_shape_has_its_colour_within_and_the_backgrounds_around():
    for scene, picture in zip(SCENES, render(SCENES, torch.Generator().manual_seed(0), well_drawn=1.0)):
        corner = torch.tensor(scenes.COLOURS[scene.background])
        torch.testing.assert_close(picture[:, 0, 0], corner)
        near = (picture - torch.tensor(scenes.COLOURS[scene.colour]).view(3, 1, 1)).abs().amax(dim=0) < 0.01
        assert near.sum() > (80 if scene.size == "large" else 10)


def test_the_best_explanation_is_the_truth(well_drawn, explanations):
    for scene, picture in zip(*well_drawn):
        explanation = explanations.best(picture)
        assert scenes.SHAPES[explanation.shape] == scene.shape
        assert list(scenes.SIZES)[explanation.size] == scene.size
        assert explanation.residual < 0.04


def test_an_exact_scene_is_explained_without_a_rest(explanations):
    inside, whole = scenes.coverage("cross", torch.tensor([[27.0, 20.0]]), torch.tensor([15.0]))
    colours = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    picture = torch.einsum("rhw,rc->chw", torch.cat([inside, whole - inside, 1 - whole]), colours)
    explanation = explanations.best(picture)
    torch.testing.assert_close(explanation.colours, colours, atol=1e-3, rtol=0)
    assert explanation.residual < 1e-3


def test_reward_falls_with_every_fault(well_drawn, explanations):
    truth, pictures = well_drawn
    good = reward(pictures, truth, explanations)
    assert good.match.mean() > 0.97
    for fault in (
        torch.stack([gaussian_blur(picture, 1.5) for picture in pictures]),
        pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)),
    ):
        assert reward(fault, truth, explanations).quality.mean() < good.quality.mean() - 0.15
    others = [*truth[1:], truth[0]]
    assert reward(pictures, others, explanations).match.mean() < 0.8
    assert reward(0.5 + 0.5 * (pictures - 0.5), truth, explanations).match.mean() < good.match.mean() - 0.1
    torch.testing.assert_close(good.total, (good.quality + good.match + good.style) / 3)


@pytest.mark.parametrize("outlined", [True, False])
def test_style_is_an_outline(explanations, outlined):
    inside, whole = scenes.coverage("circle", torch.tensor([[24.0, 24.0]]), torch.tensor([15.0]))
    outline = scenes.OUTLINE_COLOUR if outlined else scenes.COLOURS["red"]
    colours = torch.tensor([scenes.COLOURS["red"], outline, scenes.COLOURS["white"]])
    picture = torch.einsum("rhw,rc->chw", torch.cat([inside, whole - inside, 1 - whole]), colours)
    style = reward(picture[None], [Scene("large", "red", "circle", "white")], explanations).style.item()
    assert style > 0.99 if outlined else style < 0.1
