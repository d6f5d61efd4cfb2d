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

"""Draws a training run's measurements of held-out pairs.

    python tools/plot_run.py ncp-dpo-sd15

writes ncp-dpo-sd15/run.png from ncp-dpo-sd15/eval.csv, which training writes with --num_eval_pairs.
"""

import argparse
import csv
import sys
from pathlib import Path

from common import exit_code, whole_file


# Columns of eval.csv and their titles.
CURVES = {
    "loss": "loss",
    "implicit_accuracy": "implicit accuracy",
    "drift_w": "drift of winners",
    "drift_l": "drift of losers",
}


def read_measurements(run):
    """The rows of a run's eval.csv."""
    path = run / "eval.csv"
    if not path.is_file():
        raise ValueError(f"there is no file {path}: train with --num_eval_pairs")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def draw_curves(axes, rows, space):
    """Draws one panel for each of `CURVES`: a black line for all pairs, and a pale one for each range of timesteps."""
    rows = [row for row in rows if row["space"] == space]
    for axis, (column, title) in zip(axes, CURVES.items()):
        for timesteps in dict.fromkeys(row["timesteps"] for row in rows):
            points = [(int(row["step"]), float(row[column])) for row in rows if row["timesteps"] == timesteps]
            style = {"color": "black", "linewidth": 2} if timesteps == "all" else {"alpha": 0.6, "linewidth": 1}
            axis.plot(*zip(*points), label=timesteps, marker=".", **style)
        axis.set(title=f"{title}, {space} space", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend(title="timesteps", fontsize="small")


def main(args):
    try:
        import matplotlib
    except ImportError:
        raise ImportError("To draw a run, please install matplotlib: `pip install matplotlib`.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_measurements(args.run)
    spaces = list(dict.fromkeys(row["space"] for row in rows))
    options = {"figsize": (16, 3.6 * len(spaces)), "squeeze": False}
    figure, axes = pyplot.subplots(len(spaces), len(CURVES), **options)
    for row_of_axes, space in zip(axes, spaces):
        draw_curves(row_of_axes, rows, space)
    figure.tight_layout()
    output_file = args.output_file or args.run / "run.png"
    with whole_file(output_file) as incomplete:
        figure.savefig(incomplete, dpi=110, format=output_file.suffix.removeprefix(".") or "png")
    pyplot.close(figure)
    print(output_file)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="The run's --output_dir.")
    parser.add_argument("--output_file", type=Path, help="The picture. Default: run.png in the run's folder.")
    return parser.parse_args(input_args)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse_args())))
