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


"""Writes tables and a plot of what `experiment.py` and `rounds.py` have measured. It measures nothing itself.

    python small_world/report.py    # the reports of both bases and of rounds, and the tables in README.md and docs/
    python small_world/report.py --output_dir small_world/results    # only the report of the runs in this folder

A row is left out until all its runs are there.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import protocol
import studies
from protocol import ROOT
from scipy import stats


sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from doc_tables import write_table  # noqa: E402
from intervals import mean_interval, win_rate_interval  # noqa: E402
from ncp_loss import LOSSES  # noqa: E402


matplotlib.use("Agg")


COMMAND = "python small_world/report.py"
STRONG_RESULTS = Path(__file__).with_name("results_strong")
ROUNDS_NAME, FRESH_NAME = "rounds.jsonl", "fresh.md"
BASELINE = "dpo-latent"
# Methods that the trainer no longer offers. A step of each took as long as a step of the method beside it.
WITHDRAWN = {
    "dpo-latent-balanced": "dpo-latent",
    "dpo-ncp-balanced": "dpo-ncp",
    "dpo-latent-profile": "dpo-latent",
    "dpo-latent-safeguard": "dpo-latent-safeguard",
    "dpo-ncp-safeguard": "dpo-ncp-safeguard",
    "dpo-sum": "dpo-sum",
    "dpo-latent-inverted": "dpo-latent-inverted",
}
# Methods that differ in one thing.
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
# DPO by the space of its errors and the weights of its timesteps.
PARTS_OF_NCP = {
    "latent space": {
        "as in latent DPO": "dpo-latent",
        "balanced": "dpo-latent-balanced",
        "as in NCP": "dpo-latent-profile",
    },
    "feature space": {"balanced": "dpo-ncp-balanced", "as in NCP": "dpo-ncp"},
}
ROUND_DUELS = (
    ("round 1", "base"),
    ("round 2", "round 1"),
    ("control 2", "round 1"),
    ("round 2", "control 2"),
    ("round 3", "round 2"),
    ("control 3", "round 1"),
    ("round 3", "control 3"),
)
# The rows of README's table, and what it calls them.
SUMMARY = {
    "dpo-latent": "latent DPO",
    "dpo-ncp": "NCP-DPO",
    "dpo-latent-filtered": "latent DPO, filtered pairs",
    "dpo-ncp-filtered": "NCP-DPO, filtered pairs",
    "simpo-latent-filtered": "latent SimPO, filtered pairs",
    "simpo-ncp-filtered": "NCP-SimPO, filtered pairs",
}
# What pages call the other rows of studies.
TITLES = {
    **SUMMARY,
    "dpo-ncp-zero-filtered": "NCP-DPO, filtered pairs, clean predictions",
    "simpo-ncp-zero-filtered": "NCP-SimPO, filtered pairs, clean predictions",
    "dpo-latent-filtered:agreed": "latent DPO, agreed pairs",
    "dpo-latent-filtered:matched": "latent DPO, matched pairs",
    "simpo-latent-filtered:agreed": "latent SimPO, agreed pairs",
    "simpo-latent-filtered:matched": "latent SimPO, matched pairs",
    "dpo-latent-32": "latent DPO, 32 pairs per step",
    "dpo-ncp-32": "NCP-DPO, 32 pairs per step",
}
PARTS = ("quality", "match", "style")
SETTINGS = ("trainings", "learning rate", "β", "steps")
FRESH_COLUMNS = ("method", *SETTINGS, "reward", *PARTS, "over the base")
COMPARED = ("", "against", "reward", "corrected p", "says")
SECOND_JUDGE = "over the base, second judge"
AT_THE_BEST = ("reward", *PARTS, "over the base", "over latent DPO", "beats latent DPO")
COLUMNS = ("method", *SETTINGS, *AT_THE_BEST, "at equal steps", "at equal time")
# A difference whose interval is within these bounds is called level.
LEVEL_WITHIN, SIGNIFICANT = 0.02, 0.05


class Row:
    """A method's runs: `tried` with the first seed, and `tested` with the chosen settings, by seed."""

    def __init__(self, method, runs):
        self.method = method
        self.tried = [run for run in runs if "choosing" in run]
        tried = {(run["learning_rate"], run["beta"]): run for run in self.tried}
        self.learning_rate, self.beta, self.steps, self.step = protocol.choose(
            method, lambda rate, beta, steps: tried[rate, beta]
        )
        chosen = [run for run in runs if (run["learning_rate"], run["beta"]) == (self.learning_rate, self.beta)]
        steps = set(map(str, self.steps))
        self.tested = {run["seed"]: run for run in chosen if steps <= run.get("test", {}).keys()}
        self.seconds = [run["seconds_per_step"] for run in runs if "seconds_per_step" in run]

    @property
    def seconds_per_step(self):
        return np.median(self.seconds) if self.seconds else None

    @property
    def work(self):
        """Returns what decides how long a step takes. Rows in which it is the same share their times."""
        same = WITHDRAWN.get(self.method, self.method)
        if same not in protocol.METHODS:
            return [same]
        options = {"loss_type": "dpo", "loss_space": "ncp", **protocol.METHODS[same]}
        names = ("loss_space", "ncp_layer", "mixed_precision", "ncp_probe_rms")
        loss = options["loss_type"]
        return [loss == "sft", LOSSES[loss].needs_reference, *(options.get(name) for name in names)]

    def rewards(self, seed, step=None):
        """Returns the rewards `(pictures of a caption, captions)` after a step, by default the chosen one."""
        return by_caption(self.tested[seed]["test"][str(step or self.step)]["total"])

    def curve(self, seed):
        """Returns the mean rewards `(steps, captions)` after all measured steps, of pictures from the same noise."""
        number = min(len(self.rewards(seed, step)) for step in self.steps)
        return np.array([self.rewards(seed, step)[:number].mean(axis=0) for step in self.steps])

    @property
    def goals(self):
        """Returns the mean reward that labelled the pairs after the chosen step, by seed."""
        step = str(self.step)
        return {seed: protocol.goal(self.method, run["test"][step]) for seed, run in self.tested.items()}

    def part(self, name):
        return np.mean([run["test"][str(self.step)][name] for run in self.tested.values()])


def load_rows(runs):
    """Returns the rows whose settings are chosen and tested, by method. Withdrawn methods come last."""
    rows = {}
    for method in (*protocol.METHODS, *WITHDRAWN):
        try:
            row = Row(method, [run for run in runs if run["method"] == method])
        except KeyError:
            continue  # A setting has not been tried yet.
        if row.tested:
            rows[method] = row
    for _, alike in itertools.groupby(sorted(rows.values(), key=lambda row: str(row.work)), lambda row: row.work):
        alike = list(alike)
        seconds = [value for row in alike for value in row.seconds]
        for row in alike:
            row.seconds = seconds
    return rows


def by_caption(totals):
    """Returns rewards as they are stored, all captions once and then all once more, as `(pictures of a caption, captions)`."""
    return np.reshape(totals, (-1, len(protocol.split_scenes()[2])))


def interval_text(table, sign=""):
    """Returns the mean of a table `(trainings, captions)` and its 95 % interval as text."""
    mean, low, high = mean_interval(table)
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def column(values):
    """Returns a table of one value for each training."""
    return np.reshape(list(values), (-1, 1))


def common_seeds(ours, theirs):
    return sorted(ours.tested.keys() & theirs.tested.keys())


def difference_of(ours, theirs):
    """Returns the mean difference for each caption between rewards `(pictures of a caption, captions)` from the same noise."""
    number = min(len(ours), len(theirs))
    return (ours[:number] - theirs[:number]).mean(axis=0)


def difference(ours, theirs, step=None, their_step=None):
    """
    Returns the mean differences `(trainings, captions)` between pictures from the same noise, for each seed that both rows
    have. Each row is compared after its chosen step if no other step is given.
    """
    seeds = common_seeds(ours, theirs)
    return np.array([difference_of(ours.rewards(seed, step), theirs.rewards(seed, their_step)) for seed in seeds])


def difference_from_base(row, references):
    """Returns the mean differences from the base `(trainings, captions)`, each from its own noise; `None` if one is missing."""
    bases = [references.get(protocol.base_name(seed)) for seed in row.tested]
    if None in bases:
        return None
    rewards = zip(map(row.rewards, row.tested), bases)
    return np.array([difference_of(ours, by_caption(base["total"])) for ours, base in rewards])


def step_at_equal_time(ours, theirs):
    """Returns the step at which ours has trained for as long as theirs takes to its chosen step."""
    return theirs.step * theirs.seconds_per_step / ours.seconds_per_step


def difference_at_equal_time(ours, theirs):
    """
    Returns the mean differences `(trainings, captions)` after `step_at_equal_time`, for each seed that both rows have. Our
    reward is interpolated between measured steps, so the step must be between two of them.
    """
    place = np.interp(step_at_equal_time(ours, theirs), ours.steps, range(len(ours.steps)))
    before, part = int(place), place % 1
    after = min(before + 1, len(ours.steps) - 1)
    differences = []
    for seed in common_seeds(ours, theirs):
        curve, reached = ours.curve(seed), theirs.curve(seed)[theirs.steps.index(theirs.step)]
        differences.append((1 - part) * curve[before] + part * curve[after] - reached)
    return np.array(differences)


def wins(ours, theirs):
    """
    Returns the share of a caption's pictures with the higher reward `(trainings, captions)`. A tie counts one half.

    Args:
        ours, theirs (`list` of arrays of shape `(pictures of a caption, captions)`): rewards for each training. Pictures at the
            same place are from the same noise.
    """
    return np.array([((a > b) + 0.5 * (a == b)).mean(axis=0) for a, b in zip(ours, theirs)])


def wins_text(*rewards):
    rate, low, high = win_rate_interval(wins(*rewards))
    return f"{rate:.0%} ({low:.0%} to {high:.0%})"


def row_wins_text(ours, theirs):
    return wins_text(*([row.rewards(seed) for seed in common_seeds(ours, theirs)] for row in (ours, theirs)))


def adjusted_p_values(tables):
    """
    Returns the p values of t tests over trainings, corrected for their number by Holm's method, by the tables' names.

    Args:
        tables (`dict`): differences `(trainings, captions)`, two trainings or more.
    """
    p_values = {name: stats.ttest_1samp(np.mean(table, axis=1), 0).pvalue for name, table in tables.items()}
    adjusted, largest = {}, 0
    for index, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1, (len(tables) - index) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def verdict(table, p_value):
    """Returns what differences `(trainings, captions)` with a corrected p value say."""
    mean, low, high = mean_interval(table)
    if -LEVEL_WITHIN <= low and high <= LEVEL_WITHIN:
        return "level"
    return "not known" if p_value >= SIGNIFICANT else "ahead" if mean > 0 else "behind"


# Tables


def markdown(columns, lines):
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)


def settings_cells(learning_rate, beta):
    return [f"{learning_rate:g}", "" if beta is None else f"{beta:g}"]


def reference_cells(name, references):
    """Returns the cells of the best possible pictures or of the base's, by column."""
    measured = [references[name]]
    if name == "base":
        seeds = range(max(protocol.NUM_SEEDS.values()))
        measured = [references[each] for each in map(protocol.base_name, seeds) if each in references]
    rewards = [np.mean(each["total"]) for each in measured]
    spread = f" ({min(rewards):.3f} to {max(rewards):.3f} by noise)" if len(rewards) > 1 else ""
    parts = {part: f"{np.mean([each[part] for each in measured]):.3f}" for part in PARTS}
    return {
        "method": {"best": "best possible"}.get(name, name),
        "reward": f"{np.mean(rewards):.3f}{spread}",
        **parts,
    }


def past_its_best(row, step):
    return f", past its best step, {row.step}" if step > row.step else ""


def equal_time_cell(row, baseline):
    step = step_at_equal_time(row, baseline)
    if not row.steps[0] <= step <= row.steps[-1]:
        return f"not measured: needs {step:.0f} steps, has {row.steps[-1]}"
    return interval_text(difference_at_equal_time(row, baseline), "+") + past_its_best(row, step)


def row_cells(row, baseline, references):
    """Returns a row's cells by column."""
    cells = dict(zip(SETTINGS, [len(row.tested), *settings_cells(row.learning_rate, row.beta), row.step]))
    rewards = np.array([row.rewards(seed).mean(axis=0) for seed in row.tested])
    cells |= {"method": row.method, "reward": interval_text(rewards)}
    cells |= {part: f"{row.part(part):.3f}" for part in PARTS}
    from_base = difference_from_base(row, references)
    if from_base is not None:
        cells["over the base"] = interval_text(from_base, "+")
    if row is not baseline:
        cells["over latent DPO"] = interval_text(difference(row, baseline), "+")
        equal_steps = difference(row, baseline, baseline.step, baseline.step)
        cells["at equal steps"] = interval_text(equal_steps, "+") + past_its_best(row, baseline.step)
        cells["at equal time"] = equal_time_cell(row, baseline) if row.seconds else "not measured"
        cells["beats latent DPO"] = row_wins_text(row, baseline)
    if row.seconds:
        cells["seconds per step"] = f"{row.seconds_per_step:.3f}"
    return cells


def table(columns, lines):
    """Returns a table of some columns of `lines`, which hold cells by column."""
    return markdown(columns, [[line.get(column, "") for column in columns] for line in lines])


def parts_table(rows):
    def cell(method):
        return interval_text(difference(rows[method], rows[BASELINE]), "+") if method in rows else ""

    weights = ("as in latent DPO", "balanced", "as in NCP")
    lines = [
        [space, *("0" if methods.get(weight) == BASELINE else cell(methods.get(weight)) for weight in weights)]
        for space, methods in PARTS_OF_NCP.items()
    ]
    return markdown(["errors in", *(f"timesteps {weight}" for weight in weights)], lines)


def duels_table(rows, withdrawn):
    """
    Compares methods that differ in one thing. Each method is at its best.

    Args:
        rows (`dict`): rows by method.
        withdrawn (`bool`): compare only pairs with a withdrawn method; otherwise only pairs without one.
    """
    lines = [
        [
            ours,
            theirs,
            interval_text(difference(rows[ours], rows[theirs]), "+"),
            row_wins_text(rows[ours], rows[theirs]),
        ]
        for ours, theirs in DUELS
        if ours in rows and theirs in rows and withdrawn == (ours in WITHDRAWN or theirs in WITHDRAWN)
    ]
    return markdown(["", "against", "reward", "wins"], lines)


def comparisons_of(results):
    """Returns the differences `(trainings, captions)` of all rows that are compared, by `(ours, theirs)`."""
    rows = {**results.rows, **results.withdrawn}
    pairs = dict.fromkeys([*DUELS, *((method, BASELINE) for method in rows if method != BASELINE)])
    return {
        (ours, theirs): difference(rows[ours], rows[theirs])
        for ours, theirs in pairs
        if ours in rows and theirs in rows
    }


def first_seed_ahead(rows):
    """Returns by how much the first seed's rewards are above the other seeds', after the chosen steps and after all others."""
    chosen, others = [], []
    for row in rows:
        seeds = [seed for seed in row.tested if seed != protocol.SEED]
        means = {seed: row.curve(seed).mean(axis=1) for seed in row.tested}
        ahead = means[protocol.SEED] - np.mean([means[seed] for seed in seeds], axis=0)
        for step, value in zip(row.steps, ahead):
            (chosen if step == row.step else others).append(value)
    return np.mean(chosen), np.mean(others)


def score_of(run):
    """Returns a fresh training's mean rewards of its three checkpoints `(captions,)`."""
    return np.mean([by_caption(measured["total"]).mean(axis=0) for measured in run["test"].values()], axis=0)


def study_scores(study, row, seeds, runs):
    """Returns the scores of the trainings of a study's row with some seeds `(trainings, captions)`."""
    return np.array([score_of(runs[studies.run_name(study, row, seed)]) for seed in seeds])


def study_rows(study, runs):
    """
    Returns the cells of a study's rows by column.

    Args:
        study (`str`): one of `studies.STUDIES`, all of whose trainings are there.
        runs (`dict`): lines of `fresh_runs.jsonl` by name.
    """
    rows, seeds, _ = studies.STUDIES[study]
    lines = []
    for name, row in rows.items():
        trainings = [runs[studies.run_name(study, name, seed)] for seed in seeds]
        bases = [by_caption(runs[studies.base_name(row.judge, seed)]["total"]).mean(axis=0) for seed in seeds]
        scores, steps = np.array([score_of(training) for training in trainings]), ", ".join(trainings[0]["test"])
        settings = settings_cells(trainings[0]["learning_rate"], trainings[0]["beta"])
        cells = {"method": TITLES.get(name, name), **dict(zip(SETTINGS, [len(seeds), *settings, steps]))}
        cells |= {"reward": interval_text(scores), "over the base": interval_text(scores - bases, "+")}
        cells |= {part: f"{part_of(trainings, part):.3f}" for part in PARTS}
        lines.append(cells)
    return lines


def part_of(trainings, part):
    """Returns the mean of a part of the reward over fresh trainings and their checkpoints."""
    return np.mean([measured[part] for training in trainings for measured in training["test"].values()])


def study_comparisons(study, runs):
    """Returns lines of a table of a study's comparisons, corrected for their number."""
    _, seeds, comparisons = studies.STUDIES[study]
    tables = {
        (ours, theirs): study_scores(*ours, seeds, runs) - study_scores(*theirs, seeds, runs)
        for ours, theirs in comparisons
    }
    p_values = adjusted_p_values(tables)
    return [
        [
            *(TITLES.get(row, row) for _, row in pair),
            interval_text(differences, "+"),
            f"{p_values[pair]:.3f}",
            verdict(differences, p_values[pair]),
        ]
        for pair, differences in tables.items()
    ]


def complete_studies(runs):
    return [study for study in studies.STUDIES if studies.is_complete(study, runs)]


def fresh_conclusions(runs_of_bases):
    """
    Returns a table of the comparisons of all complete studies.

    Args:
        runs_of_bases (`dict`): lines of `fresh_runs.jsonl` by name, by the name of their base.
    """
    lines = []
    for base, runs in runs_of_bases.items():
        for study in complete_studies(runs):
            compared = study_comparisons(study, runs)
            title = f"`{study}`{base}, {len(compared)} comparisons"
            lines += [[title, *line] for line in compared]
    return markdown(["study", *COMPARED], lines)


def conclusions_table(small, strong):
    """
    Returns a table of the differences between the rows of README's table, with what they say once all comparisons with both
    bases are corrected for, and a sentence about all comparisons.
    """
    bases = {"small base": comparisons_of(small), "stronger base": comparisons_of(strong)}
    tables = {(base, *pair): table for base, tables in bases.items() for pair, table in tables.items()}
    p_values = adjusted_p_values(tables)

    def cells(base, pair):
        table = tables[base, *pair]
        return [interval_text(table, "+"), verdict(table, p_values[base, *pair])]

    pairs = [(ours, theirs) for (_, ours), (_, theirs) in studies.six_comparisons("six")]
    pairs += [(f"simpo-{space}-filtered", BASELINE) for space in ("latent", "ncp")]
    lines = [
        [SUMMARY[ours], SUMMARY[theirs], *(cell for base in bases for cell in cells(base, (ours, theirs)))]
        for ours, theirs in pairs
    ]
    columns = ["", "against", *(title for base in bases for title in (base, "says"))]
    chosen, others = first_seed_ahead([*small.rows.values(), *small.withdrawn.values()])
    significant = sum(p_value < SIGNIFICANT for p_value in p_values.values())
    return f"""{markdown(columns, lines)}

These are {len(lines)} of {len(tables)} comparisons, {" and ".join(f"{len(tables)} with the {base}" for base, tables in bases.items())}. A t test over trainings says that two rows
differ, corrected for {len(tables)} comparisons by Holm's method, in {significant or "none"} of them.

The first seed, which has chosen all settings, is {chosen:+.3f} from the mean of the others after the chosen steps of the
{len(small.rows) + len(small.withdrawn)} rows with the small base, and {others:+.3f} after all other measured steps."""


def all_steps(rows):
    return sorted({step for row in rows.values() for step in row.steps})


def steps_table(rows):
    lines = []
    for method, row in rows.items():
        means = dict(zip(row.steps, np.mean([row.curve(seed) for seed in row.tested], axis=(0, 2))))
        lines.append([method, *(f"{means[step]:.3f}" if step in means else "" for step in all_steps(rows))])
    return markdown(["method", *all_steps(rows)], lines)


def choosing_table(rows):
    lines = [
        [
            row.method,
            *settings_cells(run["learning_rate"], run["beta"]),
            *(
                f"{protocol.goal(row.method, run['choosing'][str(step)]):.3f}" if str(step) in run["choosing"] else ""
                for step in all_steps(rows)
            ),
            "✓" if (run["learning_rate"], run["beta"]) == (row.learning_rate, row.beta) else "",
        ]
        for row in rows.values()
        for run in sorted(row.tried, key=lambda run: (run["learning_rate"], run["beta"] or 0))
    ]
    return markdown(["method", "learning rate", "β", *all_steps(rows), "chosen"], lines)


def labels_table(rows, references):
    """Shows the methods whose pairs are labelled by one part of the reward. They are measured by the same part."""
    lines = []
    for method, row in rows.items():
        kind, _, part = method.partition("-by-")
        bases = [protocol.goal(method, references[protocol.base_name(seed)]) for seed in row.tested]
        line = [part, kind, len(row.tested), *settings_cells(row.learning_rate, row.beta), row.step]
        line += [f"{np.mean(bases):.3f}", interval_text(column(row.goals.values()))]
        latent = rows.get(method.replace("ncp", "latent"), row)
        differences = column(row.goals[seed] - latent.goals[seed] for seed in common_seeds(row, latent))
        lines.append([*line, "" if latent is row else interval_text(differences, "+")])
    return markdown(["labelled and measured by", "method", *SETTINGS, "base", "that part", "over latent DPO"], lines)


def rounds_table(results):
    """Compares the models of `rounds.py` with each other."""
    lines = []
    for ours, theirs in ROUND_DUELS:
        rewards = [[by_caption(result["rewards"][name]["total"]) for result in results] for name in (ours, theirs)]
        differences = [difference_of(*pair) for pair in zip(*rewards)]
        lines.append([ours, theirs, interval_text(differences, "+"), wins_text(*rewards)])
    return markdown(["", "against", "reward", "wins"], lines)


# Reports

PLOTS = {
    "all and filtered pairs": (
        *("dpo-latent", "dpo-ncp"),
        *(f"{loss}-{space}-filtered" for loss in ("dpo", "simpo") for space in ("latent", "ncp")),
    ),
    "losses": tuple(f"{loss}-{space}" for loss in ("dpo", "cpo", "simpo") for space in ("latent", "ncp")),
}


def plot(rows, references, path):
    """Plots rewards by steps, in one panel for each of `PLOTS`. Step 0 is the base from the same noise, where it was measured."""
    shown = {title: [method for method in rows if method in methods] for title, methods in PLOTS.items()}
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown) + 1, 5), sharey=True, layout="constrained")
    for axis, (title, methods) in zip(axes, shown.items()):
        for method in methods:
            row, steps = rows[method], rows[method].steps
            curves = np.array([row.curve(seed).mean(axis=1) for seed in row.tested])
            bases = [references.get(protocol.base_name(seed)) for seed in row.tested]
            if None not in bases:
                number = protocol.PICTURES_PER_CAPTION
                starts = [by_caption(base["total"])[:number].mean() for base in bases]
                curves, steps = np.column_stack([starts, curves]), [0, *steps]
            (line,) = axis.plot(steps, curves.mean(axis=0), "--" if "latent" in method else "-", label=method)
            errors = curves.std(axis=0, ddof=min(1, len(curves) - 1)) / np.sqrt(len(curves))
            band = curves.mean(axis=0) - errors, curves.mean(axis=0) + errors
            axis.fill_between(steps, *band, color=line.get_color(), alpha=0.12)
        axis.set(xlabel="steps", title=title)
        # Below the axes: in them it would cover curves.
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    axes[0].set(ylabel="true reward on held-out captions")
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Results(NamedTuple):
    """The results of a folder's runs. Rows are by method, cells by method and column."""

    runs: list
    references: dict
    rows: dict
    withdrawn: dict
    labelled: dict
    cells: dict


def load_results(folder):
    runs = protocol.load_runs(folder / protocol.RUNS_NAME)
    references = {name: run for name, run in runs.items() if "method" not in run}
    runs = [run for run in runs.values() if "method" in run]
    rows = load_rows(runs)
    labelled = {method: rows.pop(method) for method in list(rows) if "-by-" in method}
    cells = {name: reference_cells(name, references) for name in ("best", "base")}
    cells |= {method: row_cells(row, rows[BASELINE], references) for method, row in rows.items()}
    withdrawn = {method: rows.pop(method) for method in list(rows) if method in WITHDRAWN}
    return Results(runs, references, rows, withdrawn, labelled, cells)


def method_table(results, columns, rows):
    return table(columns, [results.cells[name] for name in rows])


def describe_withdrawn(results):
    return f"""
## Withdrawn methods

These methods earned nothing, so the scripts no longer offer them. Their runs stay in [`{protocol.RUNS_NAME}`]({protocol.RUNS_NAME}).

- *balanced* (`--timestep_weighting balanced`) divides errors by the standard deviation of the margins at each timestep.
- *profile* (`--timestep_weighting ncp`) weights errors in latent space. The margins then have NCP's spread at each timestep.
- *safeguard* (`--sdpo_safeguard`) weakens the loser's gradient where it would raise the winner's error.
- *sum* uses the mean of the errors in latent space and in feature space.
- *inverted* takes the noise from DDIM inversion of the picture by the reference, as in InPO (arXiv:2503.18454).

{method_table(results, (*COLUMNS, "seconds per step"), results.withdrawn)}

{duels_table({**results.rows, **results.withdrawn}, withdrawn=True)}
"""


def describe_labelled(results):
    return f"""
## What is preferred

One part of the reward labels the same pairs. *match* is coarse. *drawing* is fine: the mean of quality and style. The same part chooses
the settings.

{labels_table(results.labelled, results.references)}
"""


def describe(results, folder):
    """Returns the report of a folder's results."""
    rows, references, captions = results.rows, results.references, len(protocol.split_scenes()[2])
    few, many = protocol.PICTURES_PER_CAPTION * captions, protocol.TEST_PICTURES_PER_CAPTION * captions
    expected = [method for method in protocol.METHODS if protocol.NUM_SEEDS[method]]
    missing = [method for method in expected if method not in {**rows, **results.labelled}]
    not_measured = f"Not measured: {', '.join(missing)}.\n" if missing else ""
    all_rows = {**rows, **results.withdrawn}
    base = [
        references[name]
        for seed in range(max(protocol.NUM_SEEDS.values()))
        if (name := protocol.base_name(seed)) in references
    ]
    base_note = "" if len(base) > 1 else " The base was measured with the first seed's noise only."
    base_few = np.mean([each["total"][:few] for each in base])
    return f"""# Small world

`python small_world/experiment.py` has made {len(results.runs)} runs. Their numbers and commands are in [`{protocol.RUNS_NAME}`]({protocol.RUNS_NAME}).
`{COMMAND} --output_dir {os.path.relpath(folder, ROOT)}` has written this page.
{not_measured}
{method_table(results, (*COLUMNS, "seconds per step"), ("best", "base", *rows))}

![Reward against steps](rewards.png)

- *reward* is the mean of *quality* (sharp and even), *match* (with the caption) and *style* (a dark outline). Each is in [0, 1]. It is
  measured on {many} pictures of held-out captions after the chosen number of *steps*.
- *best possible* are well-drawn, outlined pictures that the base's VAE has encoded and decoded.
- *learning rate*, *β* and *steps* are chosen for each method with the first seed, on other captions
  ([how](#how-settings-were-chosen)).
- *over the base* is the mean difference from the base's pictures, and *over latent DPO* from those of latent DPO trained with the same
  seed, between pictures from the same noise. Each method is at its best.{base_note}
- *at equal steps* is the difference from latent DPO after latent DPO's steps. *at equal time* is the same difference after the time that
  latent DPO's steps take. These two use {few} pictures, and *at equal time* interpolates between measured steps. A cell says so where
  a method is past its own best step, or was not trained for as long.
- *beats latent DPO* is the share of pictures with a higher reward than latent DPO's.
- Numbers in brackets are 95 % intervals over trainings and captions ([how](../../tools/intervals.py)). All trainings share one draw of
  pairs and labels, and no interval contains what another draw would change.
- *seconds per step* is the time of one core of a machine that did other work as well. It is the median over all runs whose steps compute
  the same. Each run counts with the 10th percentile of its steps.

## One difference at a time

Each method is at its best.

{duels_table(rows, withdrawn=False)}

## What NCP is made of

The reward of DPO minus that of latent DPO. Rows differ in what errors are measured in, columns in how timesteps are weighted: *balanced*
divides errors by the standard deviation of the margins at each timestep, and *as in NCP* gives margins the spread that NCP's have at each
timestep (in latent space this is the method *profile*). Each method is at its best. The scripts no longer offer these weights. They keep
*as in latent DPO* in latent space and *as in NCP* in feature space.

{parts_table(all_rows)}
{describe_withdrawn(results) if results.withdrawn else ""}{describe_labelled(results) if results.labelled else ""}
## Reward by steps

The mean of {few} pictures with the chosen learning rate and β. The base has {base_few:.3f}.

{steps_table(all_rows)}

## How settings were chosen

Every run with the first seed is measured on {few} pictures of captions that only choose settings. The base has
{np.mean(references["base-choosing"]["total"]):.3f} on them. A run is measured after {", ".join(map(str, protocol.STEPS))} steps, or on filtered pairs after {", ".join(map(str, protocol.FILTERED_STEPS))}.
Its best step counts. Learning rate and β are doubled and halved in turn as long as that is better. If the last step is the best, training
goes on with the chosen settings, up to {protocol.MAX_STEPS} steps.

{choosing_table({**all_rows, **results.labelled})}
"""


def load_rounds(folder):
    """Returns what `rounds.py` has measured, by seed."""
    return list(protocol.load_runs(folder / ROUNDS_NAME).values())


def describe_rounds(results):
    """Returns the report of `rounds.py`."""
    settings, base = results[0]["settings"], results[0]["rewards"]["base"]
    lines = [
        [
            name,
            interval_text([by_caption(result["rewards"][name]["total"]).mean(axis=0) for result in results]),
            *(f"{np.mean([result['rewards'][name][part] for result in results]):.3f}" for part in PARTS),
        ]
        for name in results[0]["rewards"]
    ]
    return f"""# Three rounds in the small world

`python small_world/rounds.py` has measured {len(results)} seeds. Their numbers are in [`{ROUNDS_NAME}`]({ROUNDS_NAME}). This page is
written from them.

{markdown(["", "reward", *PARTS], lines)}

{rounds_table(results)}

- *round 1* is a LoRA trained on pairs of the base's pictures.
- *round 2* starts from the weights of round 1 and trains on pairs that round 1 has drawn of the same captions. *round 3* starts from
  round 2 in the same way. Each LoRA replaces the one before.
- *control 2* starts from round 1 and *control 3* from control 2. They train for as many steps as rounds 2 and 3, on the pairs of round 1.
- The true reward with noise labels all pairs.
- Every training is latent DPO for {settings["steps"]} steps of 8 pairs, with rank 16, β {settings["beta_dpo"]:g} and learning rate {settings["learning_rate"]:g}. It has {settings["num_scenes"]} captions with
  {settings["pictures_per_scene"]} pictures each. Every two pictures of a caption are a pair.
- A reward is the mean of {len(base["total"])} pictures of held-out captions for each seed. All models of a seed draw from the same noise.
- *reward* in the second table is the mean difference between pictures from the same noise. *wins* is the share of pictures with the
  higher reward. Numbers in brackets are 95 % intervals over seeds and captions ([how](../../tools/intervals.py)).
"""


def describe_trade_off(runs):
    """Returns sentences on the base's reward in `six`, and on what SimPO on filtered pairs gains and loses."""
    seeds = studies.STUDIES["six"].seeds
    bases = [runs[studies.base_name("first", seed)] for seed in seeds]
    rewards = [np.mean(base["total"]) for base in bases]

    def changes(row):
        ours, theirs = ([runs[studies.run_name("six", name, seed)] for seed in seeds] for name in (row, BASELINE))
        return ", ".join(f"{part} {part_of(ours, part) - part_of(theirs, part):+.3f}" for part in PARTS)

    return f"""The base's own reward is {np.mean(rewards):.3f} ({min(rewards):.3f} to {max(rewards):.3f} over noise seeds): {", ".join(f"{part} {np.mean([base[part] for base in bases]):.3f}" for part in PARTS)}.
Compared with latent DPO, latent SimPO on filtered pairs changes {changes("simpo-latent-filtered")},
and NCP-SimPO {changes("simpo-ncp-filtered")}."""


def describe_fresh(runs):
    """Returns the report of the complete studies of `fresh.py`."""
    sections = [
        f"\n## {study}\n\n{table(FRESH_COLUMNS, study_rows(study, runs))}\n\n"
        f"{markdown(COMPARED, study_comparisons(study, runs))}\n"
        for study in complete_studies(runs)
    ]
    return f"""# Fresh seeds in the small world

`python small_world/fresh.py` has made the trainings in [`{studies.RUNS_NAME}`]({studies.RUNS_NAME}). This page is written from them. It has the
studies that are complete. [analysis.md](../analysis.md) says what they are and what the columns mean.
{"".join(sections)}"""


def document_tables():
    """Returns the tables of the Markdown files outside this folder, by file and name."""
    small, strong = load_results(protocol.RESULTS), load_results(STRONG_RESULTS)
    fresh, fresh_strong = (
        protocol.load_runs(folder / studies.RUNS_NAME) for folder in (protocol.RESULTS, STRONG_RESULTS)
    )
    six, second = study_rows("six", fresh), study_rows("judge", fresh)
    summary = [{**row, SECOND_JUDGE: other["over the base"]} for row, other in zip(six, second)]
    columns = ["method", "reward", *PARTS, "over the base", SECOND_JUDGE]
    summary = f"{table(columns, summary)}\n\n{describe_trade_off(fresh)}"
    page, older = (ROOT / "docs" / name for name in ("results.md", "results_older.md"))
    others = [method for method in small.rows if method not in SUMMARY]

    def first_six(results):
        return method_table(results, COLUMNS, ("best", "base", *(name for name in SUMMARY if name in results.rows)))

    return {
        (ROOT / "README.md", "small-world"): summary,
        (ROOT / "docs" / "upstream_README.md", "small-world"): summary,
        (page, "small-world-conclusions"): fresh_conclusions({"": fresh, ", stronger base": fresh_strong}),
        (page, "small-world-six"): table(FRESH_COLUMNS, six),
        (page, "small-world-strong"): table(FRESH_COLUMNS, study_rows("six", fresh_strong)),
        (page, "small-world-rounds"): rounds_table(load_rounds(protocol.RESULTS)),
        (older, "small-world-first-conclusions"): conclusions_table(small, strong),
        (older, "small-world-first-six"): first_six(small),
        (older, "small-world-first-strong"): first_six(strong),
        (older, "small-world-others"): method_table(small, COLUMNS, others),
        (older, "small-world-duels"): duels_table(small.rows, withdrawn=False),
        (older, "small-world-labels"): labels_table(small.labelled, small.references),
        (older, "small-world-withdrawn"): method_table(small, COLUMNS, small.withdrawn),
    }


def write_report(folder):
    results = load_results(folder)
    plot(results.rows, results.references, folder / "rewards.png")
    (folder / "README.md").write_text(describe(results, folder), encoding="utf-8")


def write_fresh(folder):
    runs = protocol.load_runs(folder / studies.RUNS_NAME)
    if runs:
        (folder / FRESH_NAME).write_text(describe_fresh(runs), encoding="utf-8")


def write_rounds(folder):
    (folder / "rounds.md").write_text(describe_rounds(load_rounds(folder)), encoding="utf-8")


def main(args):
    for folder in [args.output_dir] if args.output_dir else (protocol.RESULTS, STRONG_RESULTS):
        write_report(folder)
        write_fresh(folder)
    if args.output_dir is None:
        write_rounds(protocol.RESULTS)
        for (file, name), text in document_tables().items():
            write_table(file, name, COMMAND, text)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, help="folder of runs.jsonl; default: both bases', and README.md and docs/ as well"
    )
    return parser.parse_args(input_args)


if __name__ == "__main__":
    main(parse_args())
