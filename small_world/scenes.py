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

"""The small world: its captions, its pictures, and the reward of a picture, which is hidden from the model.

A scene is a shape of one colour on a background of another, plain or with a dark outline. Pictures of it are drawn well or
badly: blurred, grainy or pale. The reward of a picture follows from the scene that explains it best. To find that scene, all
scenes are tried on a fine grid of places and sizes.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


RESOLUTION = 48
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.15, 0.30, 0.85),
    "yellow": (0.95, 0.85, 0.20),
    "purple": (0.55, 0.20, 0.70),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 10.0, "large": 15.0}  # radius in pixels
OUTLINE = 2.5  # width in pixels
OUTLINE_COLOUR = (0.05, 0.05, 0.05)


class Scene(NamedTuple):
    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self):
        return f"a {self.size} {self.colour} {self.shape} on {self.background}"


SCENES = [Scene(*values) for values in itertools.product(SIZES, COLOURS, SHAPES, COLOURS) if values[1] != values[3]]


def signed_distance(shape, x, y, radius):
    """Returns the distance of points (x, y) from the outline of `shape` in pixels, negative inside. The shapes broadcast."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * radius
    if shape == "triangle":
        # Equilateral, standing on its base
        return torch.maximum(x.abs() * math.cos(math.pi / 6) - y * 0.5, y) - 0.55 * radius
    upright = torch.maximum(x.abs() - 0.48 * radius, y.abs() - radius)
    level = torch.maximum(x.abs() - radius, y.abs() - 0.48 * radius)
    return torch.minimum(upright, level)


def coverage(shape, centers, radii):
    """
    Returns how much of each pixel a shape and its outline cover.

    Args:
        shape (`str`): one of `SHAPES`.
        centers (`torch.Tensor` of shape `(N, 2)`): x and y in pixels.
        radii (`torch.Tensor` of shape `(N,)`): in pixels.

    Returns:
        Two `torch.Tensor` of shape `(N, RESOLUTION, RESOLUTION)` in [0, 1]: for the shape within its outline,
        and for the shape with its outline.
    """
    axis = torch.arange(RESOLUTION) + 0.5
    x = axis.view(1, 1, -1) - centers[:, 0].view(-1, 1, 1)
    y = axis.view(1, -1, 1) - centers[:, 1].view(-1, 1, 1)
    distance = signed_distance(shape, x, y, radii.view(-1, 1, 1))
    return (0.5 - distance - OUTLINE).clamp(0, 1), (0.5 - distance).clamp(0, 1)


def render(scenes, generator, well_drawn=0.5):
    """
    Draws scenes at random places, half of them with an outline.

    Args:
        scenes (`list` of `Scene`): what the pictures show.
        generator (`torch.Generator`): decides everything that a caption leaves open.
        well_drawn (`float`): the share of pictures that are not blurred, grainy or pale.

    Returns:
        `torch.Tensor` of shape `(N, 3, RESOLUTION, RESOLUTION)` in [0, 1].
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    n = len(scenes)
    radii = torch.tensor([SIZES[scene.size] for scene in scenes]) * uniform(0.9, 1.1, n)
    centers = RESOLUTION / 2 + uniform(-5, 5, n, 2)
    outlined = torch.rand(n, 1, 1, generator=generator) < 0.5
    inside, whole = torch.empty(2, n, RESOLUTION, RESOLUTION)
    for shape in SHAPES:
        index = torch.tensor([scene.shape == shape for scene in scenes])
        inside[index], whole[index] = coverage(shape, centers[index], radii[index])
    inside = torch.where(outlined, inside, whole)

    colour, background = (
        torch.tensor([COLOURS[getattr(scene, name)] for scene in scenes])[..., None, None]
        for name in ("colour", "background")
    )
    inside, whole = inside[:, None], whole[:, None]
    outline_colour = torch.tensor(OUTLINE_COLOUR).view(1, 3, 1, 1)
    pictures = inside * colour + (whole - inside) * outline_colour + (1 - whole) * background

    badly = torch.rand(n, generator=generator) >= well_drawn
    for index in badly.nonzero().flatten().tolist():
        blur = uniform(0.3, 2.0, 1).item()
        pictures[index] = gaussian_blur(pictures[index], blur)
        pictures[index] = 0.5 + uniform(0.35, 1.0, 1) * (pictures[index] - 0.5)
        grain = uniform(0, 0.08, 1) * torch.randn(3, RESOLUTION, RESOLUTION, generator=generator)
        pictures[index] += grain
    return pictures.clamp(0, 1)


def gaussian_blur(picture, sigma):
    """Blurs a picture `(3, H, W)`. `sigma` is in pixels."""
    offsets = torch.arange(-6, 7).float()
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    padded = F.pad(picture[:, None], (6, 6, 6, 6), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[..., None, :]), kernel[..., None])[:, 0]


class Explanation(NamedTuple):
    """The scene that a picture shows."""

    shape: int  # index in `SHAPES`
    size: int  # index in `SIZES`
    colours: torch.Tensor  # of shape, outline and background, (3, 3)
    residual: float  # root mean square difference between the picture and the scene


class Explanations:
    """
    All scenes that a picture could show: shapes by size and place. The colours of a scene's three regions are those that fit
    the picture best (least squares). A coarse grid is searched first, then a finer one around the best scene.
    """

    def __init__(self):
        grid = RESOLUTION / 2 + torch.arange(-6.0, 6.1)
        radii = [radius * factor for radius in SIZES.values() for factor in (0.92, 1.0, 1.08)]
        self.candidates = list(itertools.product(SHAPES, radii, grid.tolist(), grid.tolist()))
        self.projections = regions_and_projections(self.candidates)

    def best(self, picture):
        """The `Explanation` of a picture `(3, RESOLUTION, RESOLUTION)` in [0, 1]."""
        index, _, _ = fit_regions(picture, *self.projections)
        shape, radius, x, y = self.candidates[index]
        offsets = (-0.5, -0.25, 0.0, 0.25, 0.5)
        factors = (0.94, 0.97, 1.0, 1.03, 1.06)
        finer = [(shape, radius * f, x + dx, y + dy) for f, dx, dy in itertools.product(factors, offsets, offsets)]
        _, colours, residual = fit_regions(picture, *regions_and_projections(finer))
        return Explanation(SHAPES.index(shape), int(radius > sum(SIZES.values()) / 2), colours, residual)


def regions_and_projections(candidates):
    """Returns the three regions `(K, 3, pixels)` of K candidates `(shape, radius, x, y)`, and their inverse Gram matrices."""
    regions = []
    for shape, group in itertools.groupby(candidates, key=lambda candidate: candidate[0]):
        radii, x, y = torch.tensor([candidate[1:] for candidate in group]).unbind(dim=1)
        inside, whole = coverage(shape, torch.stack([x, y], dim=1), radii)
        regions.append(torch.stack([inside, whole - inside, 1 - whole], dim=1).flatten(2))
    regions = torch.cat(regions)
    return regions, torch.linalg.inv(regions @ regions.mT)


def fit_regions(picture, regions, inverse_gram):
    """Returns the index, the colours `(3, 3)` and the residual of the candidate that explains a picture best."""
    picture = picture.flatten(1)
    projected = regions @ picture.mT  # (K, 3 regions, 3 channels)
    colours = inverse_gram @ projected
    explained = (colours * projected).sum(dim=(1, 2))
    # Otherwise a smaller shape without an outline could be explained by an outline of the background's colour.
    shape, outline, background = colours.unbind(dim=1)
    from_shape, from_dark, from_background = (
        (outline - other).square().sum(dim=1) for other in (shape, torch.tensor(OUTLINE_COLOUR), background)
    )
    possible = from_background > torch.minimum(from_shape, from_dark)
    index = explained.where(possible, -math.inf).argmax().item()
    residual = (picture.square().sum() - explained[index]).clamp_min(0) / picture.numel()
    return index, colours[index], residual.sqrt().item()


class Reward(NamedTuple):
    """The parts of N pictures' reward, each of shape `(N,)` in [0, 1]."""

    quality: torch.Tensor  # edges are sharp and areas even, so that the scene explains the picture
    match: torch.Tensor  # the mean over size, shape, colour and background
    style: torch.Tensor  # there is a dark outline

    @property
    def total(self):
        return (self.quality + self.match + self.style) / 3


def reward(pictures, scenes, explanations):
    """
    Returns how good pictures of scenes are.

    Args:
        pictures (`torch.Tensor` of shape `(N, 3, RESOLUTION, RESOLUTION)`): in [0, 1].
        scenes (`list` of N `Scene`): what the pictures should show.
        explanations (`Explanations`): finds what they do show.

    Returns:
        `Reward`
    """
    found = [explanations.best(picture) for picture in pictures]
    residual = torch.tensor([explanation.residual for explanation in found])
    colours = torch.stack([explanation.colours for explanation in found])
    wanted = torch.tensor([[COLOURS[scene.colour], COLOURS[scene.background]] for scene in scenes])
    off = (colours[:, [0, 2]] - wanted).square().sum(dim=-1)  # (N, 2)
    right = torch.tensor(
        [
            [SHAPES[explanation.shape] == scene.shape, list(SIZES)[explanation.size] == scene.size]
            for explanation, scene in zip(found, scenes)
        ]
    )
    match = torch.cat([right, torch.exp(-off / (2 * 0.2**2))], dim=1).mean(dim=1)
    darkness = (colours[:, 1] - torch.tensor(OUTLINE_COLOUR)).square().sum(dim=-1)
    return Reward(torch.exp(-residual / 0.05), match, torch.exp(-darkness / (2 * 0.25**2)))
