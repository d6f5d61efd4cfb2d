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


"""Tables and a plot of what `experiment.py` has measured: `python small_world/report.py` reads `small_world/results/runs` and
writes beside it. Rows that are not complete yet are left out.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import experiment
import matplotlib
import matplotlib.pyplot as plt
import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from eval_win_rate import compare  # noqa: E402
from ncp_loss import LOSSES  # noqa: E402


matplotlib.use("Agg")


BASELINE = "dpo-latent"
# Methods that differ in one thing
DUELS = (
    ("dpo-latent-balanced", "dpo-latent"),
    ("dpo-latent-profile", "dpo-latent"),
    ("dpo-ncp", "dpo-latent"),
    ("dpo-ncp", "dpo-latent-profile"),
    ("dpo-ncp-balanced", "dpo-ncp"),
    ("dpo-ncp-balanced", "dpo-latent-balanced"),
    ("dpo-ncp-down", "dpo-ncp"),
    ("dpo-ncp-scale-1", "dpo-ncp"),
    ("cpo-ncp", "cpo-latent"),
    ("sft-ncp", "sft-latent"),
    ("dpo-latent-late", "dpo-latent"),
    ("dpo-ncp-late", "dpo-ncp"),
    ("dpo-ncp-late", "dpo-latent-late"),
    ("dpo-latent-filtered", "dpo-latent"),
    ("dpo-ncp-filtered", "dpo-ncp"),
    ("dpo-ncp-filtered", "dpo-latent-filtered"),
    ("dpo-latent-safeguard", "dpo-latent"),
    ("dpo-ncp-safeguard", "dpo-ncp"),
    ("dpo-sum", "dpo-latent"),
    ("dpo-sum", "dpo-ncp"),
    ("dpo-latent-inverted", "dpo-latent"),
    ("dpo-ncp-bf16-probe", "dpo-ncp-bf16-literal"),
    ("dpo-ncp-bf16-probe", "dpo-ncp"),
    *((f"{loss}-ncp", f"{loss}-latent") for loss in ("simpo", "mapo", "dmpo", "linear")),
    ("simpo-latent-filtered", "dpo-latent-filtered"),
    ("simpo-ncp-filtered", "dpo-ncp-filtered"),
    ("simpo-ncp-filtered", "simpo-latent-filtered"),
)
# What errors are measured in, and how much each timestep weighs
PARTS_OF_NCP = {
    "latent space": {
        "as in latent DPO": "dpo-latent",
        "balanced": "dpo-latent-balanced",
        "as in NCP": "dpo-latent-profile",
    },
    "feature space": {"balanced": "dpo-ncp-balanced", "as in NCP": "dpo-ncp"},
}


class Row:
    """A method's runs: `tried` with the first seed, and those `tested` at the settings that were chosen, by seed."""

    def __init__(self, method, runs):
        self.method = method
        self.tried = [run for run in runs if "choosing" in run]
        settings = {(run["learning_rate"], run["beta"]): run for run in self.tried}
        chosen = experiment.choose(method, lambda rate, beta, steps: settings[rate, beta])
        self.learning_rate, self.beta, self.steps, self.step = chosen
        chosen = [run for run in runs if (run["learning_rate"], run["beta"]) == (self.learning_rate, self.beta)]
        steps = set(map(str, self.steps))
        self.tested = {run["seed"]: run for run in chosen if steps <= run.get("test", {}).keys()}
        self.seconds = [run["seconds_per_step"] for run in runs if "seconds_per_step" in run]

    @property
    def seconds_per_step(self):
        return np.median(self.seconds) if self.seconds else None

    @property
    def costs(self):
        """What decides how long a step takes."""
        options = {"loss_type": "dpo", "loss_space": "ncp", **experiment.METHODS[self.method]}
        passes = options["loss_type"] == "sft", LOSSES[options["loss_type"]].needs_reference
        names = ("loss_space", "ncp_layer", "mixed_precision", "ncp_probe_rms", "sdpo_safeguard")
        replaced = experiment.REPLACED.get(self.method)
        return [*passes, replaced, *(name in options and options[name] for name in names)]

    def rewards(self, seed, step=None):
        """Of pictures, after a step or that which was chosen."""
        return np.array(self.tested[seed]["test"][str(step or self.step)]["total"])

    def curve(self, seed, base):
        """Mean rewards from the base on, always of the same pictures."""
        number = min(len(self.rewards(seed, step)) for step in self.steps)
        rewards = [np.array(base["total"]), *(self.rewards(seed, step) for step in self.steps)]
        return np.array([values[:number].mean() for values in rewards])

    @property
    def goals(self):
        """What pairs are labelled by, after the step that was chosen, by seed."""
        step = str(self.step)
        return {seed: experiment.goal(self.method, run["test"][step]) for seed, run in self.tested.items()}

    def part(self, name):
        return np.mean([run["test"][str(self.step)][name] for run in self.tested.values()])


def load_rows(runs):
    """Of all methods that have been chosen for and tested, by name."""
    rows = {}
    for method in experiment.METHODS:
        try:
            row = Row(method, [run for run in runs if run["method"] == method])
        except KeyError:
            continue  # a setting has not been tried yet
        if row.tested:
            rows[method] = row
    for _, alike in itertools.groupby(sorted(rows.values(), key=lambda row: str(row.costs)), lambda row: row.costs):
        alike = list(alike)
        seconds = [value for row in alike for value in row.seconds]
        for row in alike:
            row.seconds = seconds
    return rows


def mean_and_error(values, sign=""):
    """Of one value for each training: their mean and its standard error."""
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.3f}{error}"


def common_seeds(ours, theirs):
    return sorted(ours.tested.keys() & theirs.tested.keys())


def difference(ours, theirs, step=None, their_step=None):
    """Mean difference of pictures from the same noise, a value for each seed that both have."""
    differences = []
    for seed in common_seeds(ours, theirs):
        a, b = ours.rewards(seed, step), theirs.rewards(seed, their_step)
        number = min(len(a), len(b))
        differences.append((a[:number] - b[:number]).mean())
    return differences


def difference_at_equal_time(ours, theirs, base):
    """The same at the time that their chosen step takes them, between our steps by interpolation."""
    our_step = theirs.step * theirs.seconds_per_step / ours.seconds_per_step
    return [
        np.interp(our_step, [0, *ours.steps], ours.curve(seed, base))
        - theirs.curve(seed, base)[1 + theirs.steps.index(theirs.step)]
        for seed in common_seeds(ours, theirs)
    ]


def win_rate(ours, theirs):
    """
    Share of pictures with the higher reward, ties counting half. Neither pictures of one caption nor those of one training are
    independent: for the 95 % confidence interval both captions and trainings are drawn anew (bootstrap).

    Args:
        ours, theirs (`list` of `np.ndarray` of shape `(pictures of a caption, captions)`): by training, rewards of pictures from
            the same noise.
    """
    wins = np.array([[compare(a, b).win_rate for a, b in zip(x.T, y.T)] for x, y in zip(ours, theirs)])
    rng = np.random.default_rng(0)
    trainings, captions = (rng.integers(size, size=(10_000, size)) for size in wins.shape)
    resampled = wins[trainings[:, :, None], captions[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return f"{wins.mean():.0%} ({low:.0%} – {high:.0%})"


def row_win_rate(ours, theirs):
    seeds, captions = common_seeds(ours, theirs), len(experiment.split_scenes()[2])
    return win_rate(*([row.rewards(seed).reshape(-1, captions) for seed in seeds] for row in (ours, theirs)))


def markdown(columns, lines):
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)


def settings(learning_rate, beta):
    return [f"{learning_rate:g}", "" if beta is None else f"{beta:g}"]


def table(rows, references):
    baseline, base, lines = rows[BASELINE], references["base"], []
    columns = ["method", "trainings", "learning rate", "β", "steps", "reward", "quality", "match", "style"]
    columns += ["over latent DPO", "at equal steps", "at equal time", "beats latent DPO", "seconds per step"]
    parts = ("quality", "match", "style")
    for name in ("best", "base"):
        means = [np.mean(references[name]["total"]), *(references[name][part] for part in parts)]
        title = {"best": "best possible"}.get(name, name)
        lines.append([title, *4 * [""], *(f"{mean:.3f}" for mean in means), *5 * [""]])
    for row in rows.values():
        line = [row.method, len(row.tested), *settings(row.learning_rate, row.beta), row.step]
        line += [mean_and_error([row.rewards(seed).mean() for seed in row.tested])]
        line += [f"{row.part(part):.3f}" for part in parts]
        if row is baseline:
            line += 4 * [""]
        else:
            line += [mean_and_error(difference(row, baseline), "+")]
            line += [mean_and_error(difference(row, baseline, baseline.step, baseline.step), "+")]
            line += [mean_and_error(difference_at_equal_time(row, baseline, base), "+") if row.seconds else ""]
            line += [row_win_rate(row, baseline)]
        lines.append([*line, f"{row.seconds_per_step:.3f}" if row.seconds else ""])
    return markdown(columns, lines)


def parts_table(rows):
    def cell(method):
        return mean_and_error(difference(rows[method], rows[BASELINE]), "+") if method in rows else ""

    weights = ("as in latent DPO", "balanced", "as in NCP")
    lines = [
        [space, *("0" if methods.get(weight) == BASELINE else cell(methods.get(weight)) for weight in weights)]
        for space, methods in PARTS_OF_NCP.items()
    ]
    return markdown(["errors in", *(f"timesteps {weight}" for weight in weights)], lines)


def duels(rows):
    """Methods that differ in one thing, each at its best."""
    lines = [
        [
            ours,
            theirs,
            mean_and_error(difference(rows[ours], rows[theirs]), "+"),
            row_win_rate(rows[ours], rows[theirs]),
        ]
        for ours, theirs in DUELS
        if ours in rows and theirs in rows
    ]
    return markdown(["", "against", "reward", "wins"], lines)


def all_steps(rows):
    return sorted({step for row in rows.values() for step in row.steps})


def steps_table(rows, base):
    lines = []
    for method, row in rows.items():
        means = dict(zip(row.steps, np.mean([row.curve(seed, base) for seed in row.tested], axis=0)[1:]))
        lines.append([method, *(f"{means[step]:.3f}" if step in means else "" for step in all_steps(rows))])
    return markdown(["method", *all_steps(rows)], lines)


def choosing_table(rows):
    lines = [
        [
            row.method,
            *settings(run["learning_rate"], run["beta"]),
            *(
                f"{experiment.goal(row.method, run['choosing'][str(step)]):.3f}"
                if str(step) in run["choosing"]
                else ""
                for step in all_steps(rows)
            ),
            "✓" if (run["learning_rate"], run["beta"]) == (row.learning_rate, row.beta) else "",
        ]
        for row in rows.values()
        for run in sorted(row.tried, key=lambda run: (run["learning_rate"], run["beta"] or 0))
    ]
    return markdown(["method", "learning rate", "β", *all_steps(rows), "chosen"], lines)


def labels_table(rows, base):
    """What is learnt of pairs that are labelled by one part of the reward, as that part measures it."""
    lines = []
    for method, row in rows.items():
        kind, _, part = method.partition("-by-")
        line = [part, kind, len(row.tested), *settings(row.learning_rate, row.beta), row.step]
        line += [f"{experiment.goal(method, base):.3f}", mean_and_error(list(row.goals.values()))]
        latent = rows.get(method.replace("ncp", "latent"), row)
        differences = [row.goals[seed] - latent.goals[seed] for seed in common_seeds(row, latent)]
        lines.append([*line, "" if latent is row else mean_and_error(differences, "+")])
    columns = ["labelled and measured by", "method", "trainings", "learning rate", "β", "steps", "base"]
    return markdown([*columns, "that part", "over latent DPO"], lines)


PLOTS = {
    "all and filtered pairs": (
        *("dpo-latent", "dpo-ncp"),
        *(f"{loss}-{space}-filtered" for loss in ("dpo", "simpo") for space in ("latent", "ncp")),
    ),
    "DPO, timesteps": tuple(
        f"dpo-{row}" for row in ("latent-balanced", "ncp-balanced", "latent-profile", "latent-late", "ncp-late")
    ),
    "losses": tuple(f"{loss}-{space}" for loss in ("dpo", "cpo", "simpo") for space in ("latent", "ncp")),
}


def plot(rows, base, path):
    """Rewards by steps: which pairs, which timesteps, which loss."""
    shown = {title: [method for method in rows if method in methods] for title, methods in PLOTS.items()}
    shown = {title: methods for title, methods in shown.items() if methods}
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown) + 1, 4), sharey=True, squeeze=False)
    for axis, (title, methods) in zip(axes[0], shown.items()):
        for method in methods:
            curves = np.array([rows[method].curve(seed, base) for seed in rows[method].tested])
            steps = [0, *rows[method].steps]
            (line,) = axis.plot(steps, curves.mean(axis=0), "--" if "latent" in method else "-", label=method)
            errors = curves.std(axis=0, ddof=min(1, len(curves) - 1)) / np.sqrt(len(curves))
            band = curves.mean(axis=0) - errors, curves.mean(axis=0) + errors
            axis.fill_between(steps, *band, color=line.get_color(), alpha=0.12)
        axis.set(xlabel="steps", title=title)
        axis.legend(fontsize=7, loc="lower left")
    axes[0, 0].set(ylabel="true reward on held-out captions")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(args):
    results = {file.stem: json.loads(file.read_text()) for file in sorted((args.output_dir / "runs").glob("*.json"))}
    references = {name: result for name, result in results.items() if "method" not in result}
    runs = [result for result in results.values() if "method" in result]
    rows = load_rows(runs)
    missing = [method for method in experiment.METHODS if method not in rows]
    labelled = {method: rows.pop(method) for method in list(rows) if "-by-" in method}
    plot(rows, references["base"], args.output_dir / "rewards.png")
    few, many = (
        n * len(experiment.split_scenes()[2])
        for n in (experiment.PICTURES_PER_CAPTION, experiment.TEST_PICTURES_PER_CAPTION)
    )
    report = f"""# Small world

`python small_world/experiment.py` has made {len(runs)} runs, whose numbers and commands are in [`runs`](runs), and
`python small_world/report.py --output_dir {os.path.relpath(args.output_dir, experiment.ROOT)}` this of them. {f"Not complete yet: {', '.join(missing)}." if missing else ""}

{table(rows, references)}

![Reward against steps](rewards.png)

- *reward* is the mean of *quality* (sharp and even), *match* (with the caption) and *style* (a dark outline), each in [0, 1], of {many}
  pictures of held-out captions after the *steps* that were chosen. *best possible*: well-drawn, outlined pictures, encoded and
  decoded by the base's VAE.
- *learning rate*, *β*, *steps* are chosen per method with the first seed, on captions of their own ([below](#how-settings-were-chosen)).
- *over latent DPO*: mean difference to the picture from the same noise by latent DPO trained with the same seed, each at its best; at
  latent DPO's number of steps; and at the time that these take ({few} pictures, between steps by interpolation). *beats*: share of
  pictures with the higher reward, with its 95 % interval over captions and trainings.
- ± is the standard error over trainings. Those of two or three trainings are themselves known to a factor of two.
- *seconds per step*: of one core of a machine that did other work as well, the fastest tenth of a run's, and of these the median over
  all runs whose steps do the same.

## What NCP is made of

Reward of DPO over latent DPO's, each at its best:

{parts_table(rows)}

## One thing apart

{duels(rows)}

## What is preferred

The same pairs labelled by one part of the reward alone: by *match*, which is coarse, or by *drawing*, quality and outline, which is
fine, and settings chosen by that part as well.

{labels_table(labelled, references["base"])}

## Reward by steps

The mean of {few} pictures at the chosen learning rate and β; the base's is {np.mean(references["base"]["total"][:few]):.3f}.

{steps_table(rows, references["base"])}

## How settings were chosen

Every run with the first seed is measured after {", ".join(map(str, experiment.STEPS))} steps on captions of their own ({few} pictures; the base's reward is
{np.mean(references["base-choosing"]["total"]):.3f}), on filtered pairs after {", ".join(map(str, experiment.FILTERED_STEPS))}, and its best counts. Learning rate and β are doubled and halved in
turn as long as that is better, until neither is. With what was chosen a method is trained on, up to {experiment.MAX_STEPS} steps, as long as
its last are its best.

{choosing_table({**rows, **labelled})}
"""
    (args.output_dir / "README.md").write_text(report)
    print(report)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=experiment.RESULTS)
    return parser.parse_args(input_args)


if __name__ == "__main__":
    main(parse_args())
