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

"""Shows in the small world what the error scale does.

    python small_world/experiment.py pairs
    python benchmarks/error_scale.py

prints three results: the scales that are measured with different seeds; NCP-DPO with β = 5000 at one learning rate, with a
scale of 1 (the paper as written) and with the measured scale; and the gradients of NCP-SFT with both, compared with Adam's ε.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "small_world"))

import experiment  # noqa: E402
from scenes import RESOLUTION  # noqa: E402


ADAM_EPSILON = 1e-8
WINDOW = 25


def train(folder, name, **options):
    """Trains with the script and returns the logged scalars by name, each with a value per step."""
    output_dir = folder / "error_scale" / name
    shutil.rmtree(output_dir, ignore_errors=True)
    options = {
        "pretrained_model_name_or_path": experiment.ASSETS,
        "dataset_name": folder / "pairs",
        "resolution": RESOLUTION,
        "no_hflip": None,
        "rank": 16,
        "train_batch_size": 4,
        "lr_scheduler": "constant",
        "checkpointing_steps": 10**6,
        "seed": 0,
        "output_dir": output_dir,
        **options,
    }
    events = experiment.train(options)
    return {tag: np.array([event.value for event in events.Scalars(tag)]) for tag in events.Tags()["scalars"]}


def count_up_weights(folder):
    """The number of up-weights. As long as they are zero, only they have a gradient."""
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return sum(weight.numel() for name, weight in weights.items() if ".lora.up." in name)


def print_scales(folder, num_seeds):
    """Prints the scales of `--ncp_error_scale auto` for different seeds: pairs, timesteps, noise and LoRA differ."""
    scales = []
    for seed in range(num_seeds):
        options = {"max_train_steps": 1, "learning_rate": 0, "train_batch_size": 16, "seed": seed}
        train(folder, f"seed-{seed}", loss_type="dpo", **options)
        state = (folder / "error_scale" / f"seed-{seed}" / "checkpoint-1" / "training_state.json").read_text()
        scales.append(json.loads(state)["error_scale"])
    logs = np.log(scales)
    print(f"`--ncp_error_scale auto` for {num_seeds} seeds: {', '.join(f'{scale:.0f}' for scale in sorted(scales))}.")
    spread, error = logs.std(ddof=1), logs.std(ddof=1) / math.sqrt(2 * (num_seeds - 1))
    print(f"Standard deviation of log ρ: {spread:.3f} ± {error:.3f}.\n")


def main(args):
    print_scales(args.folder, args.num_seeds)
    print(
        f"| NCP-DPO, β = 5000, learning rate {args.learning_rate} | step | logit spread | implicit accuracy | e_w / r_w |"
    )
    print("|---|---|---|---|---|")
    for scale in ("1", "auto"):
        scalars = train(
            args.folder,
            f"dpo-{scale}",
            loss_type="dpo",
            ncp_error_scale=scale,
            learning_rate=args.learning_rate,
            max_train_steps=args.steps,
        )
        ratio = scalars["error_w"] / (scalars["error_w"] - scalars["drift_w"])
        for step in (args.steps // 3, 2 * args.steps // 3, args.steps):
            window = slice(step - WINDOW, step)
            print(
                f"| scale {scale} | {step} | {scalars['logit_spread'][window].mean():.2g}"
                f" | {scalars['implicit_accuracy'][window].mean():.2f} | {np.median(ratio[window]):.3g} |"
            )

    print(f"\n| NCP-SFT | rms of a gradient's element, first {WINDOW} steps | over Adam's ε = {ADAM_EPSILON:g} |")
    print("|---|---|---|")
    for scale in ("1", "auto"):
        scalars = train(
            args.folder,
            f"sft-{scale}",
            loss_type="sft",
            ncp_error_scale=scale,
            learning_rate=0,
            max_train_steps=WINDOW,
        )
        rms = np.median(scalars["grad_norm"]) / math.sqrt(count_up_weights(args.folder / f"error_scale/sft-{scale}"))
        print(f"| scale {scale} | {rms:.2g} | {rms / ADAM_EPSILON:.2g} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small-world"), help="folder with the small world's pairs")
    parser.add_argument("--num_seeds", type=int, default=12, help="number of scales that are measured")
    parser.add_argument("--steps", type=int, default=300, help="training steps of NCP-DPO")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    main(parser.parse_args())
