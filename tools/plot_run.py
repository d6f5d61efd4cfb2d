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

"""Draws a training run: loss, implicit accuracy and drift by steps, of the pairs trained on and of held-out pairs.

    python tools/plot_run.py ncp-dpo-sd15

writes ncp-dpo-sd15/run.png. Held-out pairs are in ncp-dpo-sd15/eval.csv, which training writes with --num_eval_pairs. The pairs
trained on are in TensorBoard's files in the same folder, which training writes unless --report_to says otherwise. Drift is how
much larger an error is than the reference model's, as a share of it. If winners drift by more than a third, training went on for
too long.
"""

import csv
from pathlib import Path

import numpy as np
from common import ArgumentParser, require_package, run, whole_file


# Panels, and the lines between good and bad in them.
PANELS = {"loss": None, "implicit accuracy": 0.5, "drift of winners": 1 / 3, "drift of losers": None}


def read_measurements(folder):
    """The rows of a run's eval.csv."""
    path = folder / "eval.csv"
    if not path.is_file():
        raise ValueError(f"there is no file {path}: train with --num_eval_pairs")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return [
        {name: value if name in ("space", "timesteps") else float(value) for name, value in row.items()}
        for row in rows
    ]


def read_training(folder):
    """What TensorBoard's files in a run's folder say of every step, as rows like those of eval.csv. There may be none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = {}
    for logs in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            if "/" not in name:
                for event in events.Scalars(name):
                    rows.setdefault(event.step, {"step": event.step})[name] = event.value
    return [rows[step] for step in sorted(rows)]


def find_curves(rows):
    """The curves of some rows by panel, `{panel: (steps, values)}`."""
    curves = {}
    for panel in PANELS:
        points = []
        for row in rows:
            if panel.startswith("drift"):
                side = "w" if panel.endswith("winners") else "l"
                drift, error = row.get(f"drift_{side}"), row.get(f"error_{side}")
                # The error minus the drift is the reference's error.
                value = None if drift is None else drift / (error - drift)
            else:
                value = row.get(panel.replace(" ", "_"))
            if value is not None:
                points.append((row["step"], value))
        if points:
            curves[panel] = tuple(np.array(points).T)
    return curves


def running_mean(steps, values):
    """Means of a tenth of the values each, with the steps in their middle, and how many values that is."""
    width = max(1, len(values) // 10)
    kernel = np.full(width, 1 / width)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid"), width


def draw_space(axes, rows, training, space):
    """Draws the panels of a space: pairs trained on, held-out pairs, and pale, held-out pairs by timesteps."""
    for timesteps in sorted({row["timesteps"] for row in rows}, key=lambda text: (text == "all", text)):
        style = {"color": "black", "linewidth": 2, "label": "held-out pairs"}
        if timesteps != "all":
            style = {"alpha": 0.5, "linewidth": 1, "label": f"at timesteps {timesteps}"}
        curves = find_curves([row for row in rows if row["timesteps"] == timesteps])
        for axis, panel in zip(axes, PANELS):
            axis.plot(*curves[panel], marker=".", **style)
    curves = find_curves(training)
    for axis, (panel, limit) in zip(axes, PANELS.items()):
        if panel in curves:
            steps, values, width = running_mean(*curves[panel])
            label = f"pairs trained on, mean of {width} steps"
            axis.plot(steps, values, color="tab:purple", linewidth=1.5, zorder=1.5, label=label)
        if limit is not None:
            # The line does not change the scale: where it is out of sight, it is far away.
            scale = axis.get_ylim()
            axis.axhline(limit, color="gray", linestyle="--", linewidth=1)
            axis.set_ylim(scale)
        if panel.startswith("drift"):
            axis.yaxis.set_major_formatter("{x:.1%}")
        axis.set(title=f"{panel}, {space} space", xlabel="step")
        axis.grid(alpha=0.3)


def main(args):
    require_package("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, training = read_measurements(args.run), read_training(args.run)
    if not training:
        print(f"{args.run} has no files of TensorBoard: the picture shows held-out pairs alone.")
    # The space of training is the last one: all runs are measured in latent space too.
    spaces = list(dict.fromkeys(row["space"] for row in rows))[::-1]
    options = {"figsize": (4.2 * len(PANELS), 3.6 * len(spaces) + 0.5), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(spaces), len(PANELS), **options)
    for row_of_axes, space in zip(axes, spaces):
        draw_space(row_of_axes, [row for row in rows if row["space"] == space], training, space)
        # The other space's errors are not those that training lowers.
        training = []
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    output_file = args.output_file or args.run / "run.png"
    with whole_file(output_file) as incomplete:
        figure.savefig(incomplete, dpi=110, format=output_file.suffix.removeprefix(".") or "png")
    pyplot.close(figure)
    print(output_file)


def parse_args(input_args=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="The run's --output_dir.")
    parser.add_argument("--output_file", type=Path, help="The picture. Default: run.png in the run's folder.")
    return parser.parse_args(input_args)


if __name__ == "__main__":
    run(main, parse_args)
