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


"""Draws what a training run wrote of held-out pairs and timesteps into its output folder.

    python tools/plot_run.py ncp-dpo-sd15      # writes ncp-dpo-sd15/run.png

`eval.csv` is there with --num_eval_pairs, `timesteps.csv` where the error scale or weights were measured; either is enough.
"""

import argparse
import csv
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


CURVES = {
    "loss": "loss",
    "implicit_accuracy": "implicit accuracy",
    "drift_w": "drift of winners",
    "drift_l": "drift of losers",
}


def read_table(path):
    """Columns of a file by their names, numbers where they are such; empty if there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def draw_held_out(axes, rows, space):
    """One panel for each of `CURVES`: all held-out pairs, and pale by timesteps."""
    rows = [row for row in rows if row["space"] == space]
    for axis, (name, label) in zip(axes, CURVES.items()):
        for bucket in dict.fromkeys(row["timesteps"] for row in rows):
            points = [(int(row["step"]), float(row[name])) for row in rows if row["timesteps"] == bucket]
            style = {"color": "black", "linewidth": 2} if bucket == "all" else {"alpha": 0.6, "linewidth": 1}
            axis.plot(*zip(*points), label=bucket, marker=".", **style)
        axis.set(title=f"{label}, {space} space", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend(title="timesteps", fontsize="small")


def draw_timesteps(axes, rows):
    """The size of margins in both spaces, and the weights of errors."""
    timesteps = [int(row["timestep"]) for row in rows]
    for name, label in (("latent_margin", "latent"), ("ncp_margin", "ncp, before its scale")):
        axes[0].semilogy(timesteps, [float(row[name]) for row in rows], label=label)
    axes[0].set(title="size of margins", xlabel="timestep")
    axes[0].legend()
    axes[1].plot(timesteps, [float(row["weight"]) for row in rows])
    axes[1].set(title="weight of errors", xlabel="timestep", ylim=(0, None))
    for axis in axes[:2]:
        axis.grid(alpha=0.3)
    for axis in axes[2:]:
        axis.axis("off")


def main(args):
    held_out, timesteps = (read_table(args.run / name) for name in ("eval.csv", "timesteps.csv"))
    if not held_out and not timesteps:
        raise ValueError(f"{args.run} has neither eval.csv (--num_eval_pairs) nor timesteps.csv.")
    spaces = list(dict.fromkeys(row["space"] for row in held_out))
    num_rows = len(spaces) + bool(timesteps)
    figure, axes = plt.subplots(num_rows, len(CURVES), figsize=(16, 3.6 * num_rows), squeeze=False)
    for row, space in zip(axes, spaces):
        draw_held_out(row, held_out, space)
    if timesteps:
        draw_timesteps(axes[-1], timesteps)
    figure.tight_layout()
    output_file = args.output_file or args.run / "run.png"
    figure.savefig(output_file, dpi=110)
    print(output_file)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="The run's --output_dir.")
    parser.add_argument("--output_file", type=Path, help="The picture. Default: run.png in the run's folder.")
    return parser.parse_args(input_args)


if __name__ == "__main__":
    main(parse_args())
