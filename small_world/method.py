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

"""Draws the picture of the method in README, with a pair from the small world: `python small_world/method.py`."""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch
from scenes import SCENES, gaussian_blur, render


matplotlib.use("Agg")

BLUE, GREY, LIGHT = "#1f5fa8", "#8a8a8a", "#eef3fa"


def box(axis, x, y, width, text, color=BLUE, face=LIGHT, style="-"):
    """Draws a box with text around (x, y). Its height is 0.9."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.45), width, 0.9, "round,pad=0,rounding_size=0.12", lw=1.4, ls=style, ec=color, fc=face
    )
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=9, color="black" if color == BLUE else color)


def arrow(axis, start, end, color=BLUE, style="-"):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6, "ls": style})


def picture(axis, image, x, y, title, size=0.95):
    axis.imshow(image.permute(1, 2, 0), extent=(x - size / 2, x + size / 2, y - size / 2, y + size / 2), zorder=2)
    axis.text(x, y + size / 2 + 0.08, title, ha="center", va="bottom", fontsize=9)


def draw_method(path):
    generator = torch.Generator().manual_seed(4)
    scene = SCENES[31]
    winner = render([scene] * 40, generator, well_drawn=1.0)
    # The darkest picture has an outline.
    winner = winner[winner.mean(dim=(1, 2, 3)).argmin()]
    loser = gaussian_blur(render([scene], generator, well_drawn=1.0)[0], 1.6)
    noise = torch.randn(winner.shape, generator=generator)

    figure, axis = plt.subplots(figsize=(10.5, 3.3))
    for image, y, title in ((winner, 2.6, "preferred"), (loser, 1.1, "other")):
        picture(axis, image, 0.7, y, title)
        picture(axis, (0.55 * image + 0.25 * noise + 0.2).clamp(0, 1), 2.3, y, "")
        arrow(axis, (1.22, y), (1.78, y))
        arrow(axis, (2.82, y), (3.2, 1.85))
    axis.text(2.3, 3.16, "the same noise", ha="center", va="bottom", fontsize=9)
    axis.text(1.5, 0.3, f"“{scene.caption}”", ha="center", va="center", fontsize=9, style="italic")

    box(axis, 4.05, 1.85, 1.6, "U-Net\nwith and without\nits LoRA")
    axis.text(5.0, 1.85, "predicted noise", ha="left", va="center", fontsize=9)
    arrow(axis, (4.88, 2.0), (5.3, 2.6), GREY, "--")
    arrow(axis, (4.88, 1.7), (5.3, 1.1))

    box(axis, 7.05, 2.7, 3.3, "how far from the noise that was added,\nelement by element?", GREY, "white", "--")
    axis.text(7.05, 3.22, "Diffusion-DPO", ha="center", va="bottom", fontsize=9, color=GREY)
    arrow(axis, (8.73, 2.7), (9.22, 2.1), GREY, "--")

    box(axis, 6.0, 1.0, 1.2, "one step\nof denoising")
    arrow(axis, (6.62, 1.0), (6.9, 1.0))
    box(axis, 7.8, 1.0, 1.8, "the same U-Net's\nencoder, frozen: how far\nfrom what it should see?")
    axis.text(7.05, 0.45, "NCP-DPO", ha="center", va="top", fontsize=9, weight="bold", color=BLUE)
    arrow(axis, (8.73, 1.0), (9.22, 1.6))

    box(axis, 10.2, 1.85, 1.9, "nearer with the LoRA\nthan without, and more\nso if preferred?")
    axis.text(10.2, 1.32, "the loss", ha="center", va="top", fontsize=9)
    axis.set(xlim=(0.1, 11.2), ylim=(0.1, 3.5))
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_file", type=Path, default=Path(__file__).parent / "results" / "method.png")
    draw_method(parser.parse_args().output_file)
