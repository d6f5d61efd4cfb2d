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


"""What `fresh.py` trains and `report.py` compares: studies of settings that `experiment.py` has chosen before.

`analysis.md` says why each study is as it is. It was written before the first run.
"""

from typing import NamedTuple


RUNS_NAME = "fresh_runs.jsonl"
# None of these seeds has chosen a setting. A seed decides training, the noise of the measured pictures, which pictures of
# the pool are paired, and the labels.
SEEDS, FEW_SEEDS = range(10, 20), range(10, 15)
# A training's score is the mean reward after the chosen step and after so many steps before and after it.
STEPS_AROUND, PICTURES_PER_CAPTION = 25, 4
# The base draws so many pictures of each caption. Each seed takes `experiment.PICTURES_PER_SCENE` of them.
POOL_SIZE = 12


class Judge(NamedTuple):
    """The weights of a picture's quality, match and style. `temperature` says how noisy the judge's labels are."""

    weights: tuple
    temperature: float

    def total(self, parts):
        """Returns the judge's reward for `(quality, match, style)`: numbers, arrays or tensors."""
        return sum(weight * part for weight, part in zip(self.weights, parts))


# Each part is about a third of what the second judge can gain from the pool, and its labels are right as often as the first's.
JUDGES = {"first": Judge((1 / 3, 1 / 3, 1 / 3), 0.05), "second": Judge((0.6, 0.27, 0.13), 0.03)}


class Row(NamedTuple):
    """Trainings with a method's chosen settings. `selection` says which of a seed's pairs they read, `options` what differs."""

    method: str
    judge: str = "first"
    selection: str = "all"
    options: dict = {}


class Study(NamedTuple):
    """Rows by name, their seeds, and what is compared: pairs of `(study, row)`."""

    rows: dict
    seeds: range
    comparisons: list


def six_rows(judge):
    methods = [f"{loss}-{space}" for loss in ("dpo", "simpo") for space in ("latent", "ncp")]
    filtered = {f"{method}-filtered": Row(f"{method}-filtered", judge, "filtered") for method in methods}
    return {**{method: Row(method, judge) for method in methods[:2]}, **filtered}


def six_comparisons(study):
    """The spaces on the same pairs, filtered pairs against all, and the losses on filtered pairs."""
    pairs = [(name.replace("latent", "ncp"), name) for name in six_rows("first") if "latent" in name]
    for space in ("latent", "ncp"):
        pairs.append((f"dpo-{space}-filtered", f"dpo-{space}"))
        pairs.append((f"simpo-{space}-filtered", f"dpo-{space}-filtered"))
    return [((study, ours), (study, theirs)) for ours, theirs in pairs]


CLEAN = ("dpo-ncp", "simpo-ncp")
SELECTED = ("dpo-latent-filtered", "simpo-latent-filtered")
SPACES = ("dpo-latent", "dpo-ncp")
# In the order in which they are run.
STUDIES = {
    "six": Study(six_rows("first"), SEEDS, six_comparisons("six")),
    "judge": Study(six_rows("second"), FEW_SEEDS, six_comparisons("judge")),
    "clean": Study(
        {f"{name}-zero-filtered": Row(f"{name}-zero-filtered", selection="filtered") for name in CLEAN},
        SEEDS,
        [(("clean", f"{name}-zero-filtered"), ("six", f"{name}-filtered")) for name in CLEAN],
    ),
    "selection": Study(
        {f"{method}:{kind}": Row(method, selection=kind) for method in SELECTED for kind in ("agreed", "matched")},
        FEW_SEEDS,
        [
            comparison
            for method in SELECTED
            for comparison in (
                (("selection", f"{method}:agreed"), ("six", method)),
                (("selection", f"{method}:matched"), ("six", method)),
                (("selection", f"{method}:matched"), ("selection", f"{method}:agreed")),
            )
        ],
    ),
    "batch": Study(
        {f"{method}-32": Row(method, options={"train_batch_size": 32}) for method in SPACES},
        FEW_SEEDS,
        [
            (("batch", "dpo-ncp-32"), ("batch", "dpo-latent-32")),
            *((("batch", f"{method}-32"), ("six", method)) for method in SPACES),
        ],
    ),
}


def run_name(study, row_name, seed):
    """Returns the name of a training's line in `fresh_runs.jsonl`."""
    return f"{study}-{row_name}-{seed}"


def base_name(judge_name, seed):
    """Returns the name of the line of the base's pictures, measured by a judge from the noise of a seed."""
    return f"base-{judge_name}-{seed}"


def is_complete(study, runs):
    """Returns whether `runs` has all trainings of a study, and those of other studies that it is compared with."""
    rows, seeds = STUDIES[study].rows, STUDIES[study].seeds
    compared = {each for pair in STUDIES[study].comparisons for each in pair}
    return all(
        run_name(*each, seed) in runs for each in {*((study, row) for row in rows), *compared} for seed in seeds
    )
