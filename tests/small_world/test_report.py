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


import experiment
import numpy as np
import report


def outcome(method, seed, rewards, seconds):
    """A result with the same rewards of every part, two pictures of one caption; `seconds` are those of a hundred steps."""
    steps = experiment.steps_of(method)
    return {
        "method": method,
        "seed": seed,
        "learning_rate": 1e-3,
        "seconds": {str(step): seconds * step / 100 for step in steps},
        "test": {str(step): dict.fromkeys(report.PARTS, [reward, reward]) for step, reward in zip(steps, rewards)},
        "implicit_accuracy": {"latent": 1, "ncp": 1},
    }


def test_over_base_and_twin_at_equal_steps_and_time():
    base = {seed: dict.fromkeys(report.PARTS, [reward, reward]) for seed, reward in ((0, 0.4), (1, 0.2))}
    best = dict.fromkeys(report.PARTS, np.array([1.0]))
    chosen = {
        "dpo-latent": [outcome("dpo-latent", seed, (0.3, 0.4, 0.5, 0.7), seconds=5) for seed in (0, 1)],
        "dpo-ncp": [outcome("dpo-ncp", seed, (0.5, 0.5, last), seconds=7) for seed, last in ((0, 0.6), (1, 0.8))],
    }
    row = report.table(chosen, base, best).splitlines()[-1].split(" | ")
    assert row[2] == "0.700"
    assert row[6] == "+0.400 ± 0.283"  # 0.6 - 0.4 and 0.8 - 0.2
    assert row[8] == "+0.200 ± 0.141"  # 0.6 - 0.5 and 0.8 - 0.5
    # After 21 seconds the twin has made 420 steps: 0.66
    assert row[10] == "+0.040 ± 0.141"


def test_win_rate():
    # Two captions with two pictures each: 1 and a half of two are won. Drawing captions anew, both may be either.
    ours, theirs = [np.array([1.0, 2, 3, 4])], [np.array([0.0, 1, 3, 5])]
    assert report.win_rate(ours, theirs) == "62% (25% – 100%)"
    # As many captions with more pictures are no surer, nor are trainings that come out the same.
    assert report.win_rate(3 * ours, 3 * theirs) == "62% (25% – 100%)"


def test_win_rate_knows_that_trainings_differ():
    # Every caption is won by the pictures of one training, and lost by those of the other.
    ours, theirs = [np.ones(200), np.zeros(200)], [np.zeros(200), np.ones(200)]
    assert report.win_rate(ours, theirs) == "50% (0% – 100%)"
