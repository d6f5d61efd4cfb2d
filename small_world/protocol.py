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


"""What the small world's experiment compares, how it chooses settings, and the file that keeps its runs.

A run is one training with one learning rate, beta and seed. Its numbers and its command are a line of JSON in `runs.jsonl`.
If a run has several lines, the last one counts.
"""

import itertools
import json
import random
from pathlib import Path
from statistics import fmean

from scenes import SCENES


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
RUNS_NAME = "runs.jsonl"
SEED = 0
# The captions to train on. One half of the others chooses settings, the other half gives the results.
NUM_TRAINING_SCENES = 160
# The numbers of pictures per caption that are measured after each of the steps below, and after the chosen step.
PICTURES_PER_CAPTION, TEST_PICTURES_PER_CAPTION = 2, 8
# Pictures are measured after these steps. If the last is the best, training goes on, at most to `MAX_STEPS`, and is measured
# at the same intervals.
STEPS, MAX_STEPS = (75, 150, 225), 450
# The same for filtered pairs. They are fewer, so a run is at its best sooner.
FILTERED_STEPS = (25, 50, 75, 100, 125, 150)
# The first learning rate, and the factors by which the learning rate and beta are changed.
LEARNING_RATE, FACTORS = 5e-4, (2, 1 / 2)
# The first beta. The likelihood is a sum over a latent's elements and the loss uses their mean, so 5000 for the 16,384
# elements of SD 1.5 corresponds to 176 for the 576 here. `BETAS` is for losses whose beta means something else.
BETA_DPO, BETAS = 200, {"mapo": 0.1, "linear": 4, "sft": None}

LATENT, LATE = {"loss_space": "latent"}, {"min_timestep": 400}
FILTERED, BF16 = {"encoded_data_dir": "encoded-filtered"}, {"mixed_precision": "bf16"}
ZERO = {"ncp_timestep": "zero"}
# The options that each method adds to the trainer's command, the most important method first.
METHODS = {
    "dpo-latent": LATENT,
    "dpo-ncp": {},
    "dpo-ncp-down": {"ncp_layer": "down"},
    "cpo-latent": {"loss_type": "cpo", **LATENT},
    "cpo-ncp": {"loss_type": "cpo"},
    "sft-latent": {"loss_type": "sft", **LATENT},
    "sft-ncp": {"loss_type": "sft"},
    "dpo-latent-late": {**LATENT, **LATE},
    "dpo-ncp-late": LATE,
    "dpo-ncp-scale-1": {"ncp_error_scale": 1},
    "dpo-latent-filtered": {**LATENT, **FILTERED},
    "dpo-ncp-filtered": FILTERED,
    **{
        f"{loss}-{space}": {"loss_type": loss, "loss_space": space}
        for loss in ("simpo", "mapo", "dmpo", "linear")
        for space in ("latent", "ncp")
    },
    "simpo-latent-filtered": {"loss_type": "simpo", **LATENT, **FILTERED},
    "simpo-ncp-filtered": {"loss_type": "simpo", **FILTERED},
    **{
        f"dpo-{space}-by-{part}": {"loss_space": space, "encoded_data_dir": f"encoded-{part}"}
        for part in ("match", "drawing")
        for space in ("latent", "ncp")
    },
    "dpo-ncp-bf16-literal": {**BF16, "ncp_probe_rms": 0},
    "dpo-ncp-bf16-probe": BF16,
    "dpo-ncp-zero-filtered": {**ZERO, **FILTERED},
    "simpo-ncp-zero-filtered": {"loss_type": "simpo", **ZERO, **FILTERED},
}
# `fresh.py` measures the methods with clean predictions. Here they only get their settings.
NUM_SEEDS = {
    method: 0
    if method.endswith("zero-filtered")
    else 5
    if method in ("dpo-latent", "dpo-ncp") or method.startswith(("cpo", "sft", "simpo")) or method.endswith("filtered")
    else 3
    for method in METHODS
}


def base_name(seed):
    """Returns the name of what was measured of the base's pictures, from the noise of trainings with `seed`."""
    return "base" if seed == SEED else f"base-{seed}"


def split_scenes():
    """Returns the scenes to train on, to choose settings with, and to measure results with."""
    scenes = random.Random(SEED).sample(SCENES, len(SCENES))
    middle = (NUM_TRAINING_SCENES + len(scenes)) // 2
    return scenes[:NUM_TRAINING_SCENES], scenes[NUM_TRAINING_SCENES:middle], scenes[middle:]


def goal(method, measured):
    """Returns the mean of the reward that labels a method's pairs: the whole reward or one part of it."""
    if method.endswith("-by-match"):
        return measured["match"]
    if method.endswith("-by-drawing"):
        return (measured["quality"] + measured["style"]) / 2
    return fmean(measured["total"])


def choose(method, load):
    """
    Chooses learning rate, beta and step. A setting is as good as its best step. The learning rate and beta are multiplied
    by `FACTORS` in turn as long as the setting gets better. Then the chosen setting is trained on as long as its last step
    is its best.

    Args:
        method (`str`): one of `METHODS`, or a withdrawn method, whose settings are chosen like those of DPO on all pairs.
        load (`callable`): returns the run of the first seed for a learning rate, a beta and steps.

    Returns:
        `tuple`: learning rate, beta, the measured steps, and the best of them.
    """
    options = METHODS.get(method, {})
    steps = FILTERED_STEPS if options.items() >= FILTERED.items() else STEPS

    def scores(settings, steps):
        measured = load(*settings, steps)["choosing"]
        return {step: goal(method, measured[str(step)]) for step in steps}

    def best_step(settings, steps):
        return max(steps, key=scores(settings, steps).get)

    def score(settings):
        return max(scores(settings, steps).values())

    settings, before = (LEARNING_RATE, BETAS.get(options.get("loss_type"), BETA_DPO)), None
    while settings != before:
        before = settings
        for index, factor in itertools.product((0, 1), FACTORS):
            while settings[index] is not None:
                changed = tuple(value * factor if i == index else value for i, value in enumerate(settings))
                if score(changed) <= score(settings):
                    break
                settings = changed
    while steps[-1] < MAX_STEPS and best_step(settings, steps) == steps[-1]:
        steps = (*steps, steps[-1] + steps[0])
    return *settings, steps, best_step(settings, steps)


def load_runs(file):
    """Returns the runs in a file of JSON lines by their `"name"`; none if there is no file."""
    lines = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    # The text after the last line's end is empty, or a line that an interruption cut short.
    return {run["name"]: run for run in map(json.loads, lines[:-1])}


def append_run(file, run):
    """Adds a run to a file of JSON lines, and removes a last line cut short. Several processes may do so at the same time."""
    # Windows has no fcntl, and the demo does not need it.
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json.dumps(run, separators=(",", ":")).encode() + b"\n")
