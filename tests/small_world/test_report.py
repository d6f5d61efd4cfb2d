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
import pytest
import report


def run(method, seed, rewards, seconds_per_step):
    """A result with the same reward of both pictures of one caption."""
    test = {str(step): {"total": [reward, reward]} for step, reward in zip(experiment.STEPS, rewards)}
    result = {"method": method, "seed": seed, "learning_rate": 5e-4, "beta": 200}
    return {**result, "seconds_per_step": seconds_per_step, "test": test}


@pytest.fixture
def rows(monkeypatch):
    """Two trainings of each; the second step is latent DPO's best, the third NCP's."""
    best_steps = {"dpo-latent": 150, "dpo-ncp": 225}
    monkeypatch.setattr(experiment, "choose", lambda method, load: (5e-4, 200, experiment.STEPS, best_steps[method]))
    latent = [run("dpo-latent", seed, (0.3, 0.4, 0.2), 1) for seed in (0, 1)]
    ncp = [run("dpo-ncp", seed, (0.3, 0.5, last), 2) for seed, last in ((0, 0.6), (1, 0.8))]
    return report.Row("dpo-latent", latent), report.Row("dpo-ncp", ncp)


def test_differences_at_the_best_at_equal_steps_and_at_equal_time(rows):
    latent, ncp = rows
    base = {"total": [0.2, 0.2]}
    assert report.difference(ncp, latent) == pytest.approx([0.2, 0.4])
    assert report.mean_and_error(report.difference(ncp, latent), "+") == "+0.300 ± 0.100"
    assert report.difference(ncp, latent, 150, 150) == pytest.approx([0.1, 0.1])
    # While latent DPO makes 150 steps, NCP makes 75.
    assert report.difference_at_equal_time(ncp, latent, base) == pytest.approx([-0.1, -0.1])
    # Or 112.5, between 75 and 150.
    ncp.seconds = [4 / 3]
    assert report.difference_at_equal_time(ncp, latent, base) == pytest.approx([0.0, 0.0])


def test_what_is_learnt_of_pairs_labelled_by_one_part(monkeypatch):
    monkeypatch.setattr(experiment, "choose", lambda method, load: (5e-4, 200, experiment.STEPS, 150))
    rows = {}
    for space, matches in (("latent", (0.5, 0.7)), ("ncp", (0.6, 0.9))):
        method, runs = f"dpo-{space}-by-match", []
        for seed, match in enumerate(matches):
            runs.append(run(method, seed, (0.1, 0.1, 0.1), 1))
            runs[-1]["test"]["150"]["match"] = match
        rows[method] = report.Row(method, runs)
    latent, ncp = report.labels_table(rows, {"match": 0.4}).splitlines()[2:]
    assert latent == "| match | dpo-latent | 2 | 0.0005 | 200 | 150 | 0.400 | 0.600 ± 0.100 |  |"
    assert ncp == "| match | dpo-ncp | 2 | 0.0005 | 200 | 150 | 0.400 | 0.750 ± 0.150 | +0.150 ± 0.050 |"


def test_win_rate():
    # Two captions with two pictures each: 1 and a half of two are won. Drawing captions anew, both may be either.
    ours, theirs = [np.array([[1.0, 3], [2, 4]])], [np.array([[0.0, 3], [1, 5]])]
    assert report.win_rate(ours, theirs) == "62% (25% – 100%)"
    # As many captions with more pictures are no surer, nor are trainings that come out the same.
    assert report.win_rate(3 * ours, 3 * theirs) == "62% (25% – 100%)"


def test_win_rate_knows_that_trainings_differ():
    # Every caption is won by the pictures of one training, and lost by those of the other.
    ours, theirs = [np.ones((1, 200)), np.zeros((1, 200))], [np.zeros((1, 200)), np.ones((1, 200))]
    assert report.win_rate(ours, theirs) == "50% (0% – 100%)"


def test_rows_whose_steps_do_the_same_share_their_times(monkeypatch):
    monkeypatch.setattr(experiment, "choose", lambda method, load: (5e-4, 200, experiment.STEPS, 150))
    seconds = {
        "dpo-latent": 1,
        "linear-latent": 3,
        "dpo-latent-inverted": 9,
        "simpo-latent": 0.7,
        "dpo-ncp-bf16-probe": None,
    }
    runs = [run(method, 0, (0.1, 0.2, 0.3), value) for method, value in seconds.items()]
    del runs[-1]["seconds_per_step"]  # as those from another machine
    rows = report.load_rows(runs)
    assert {name: row.seconds_per_step for name, row in rows.items()} == {
        "dpo-latent": 2,
        "linear-latent": 2,
        "simpo-latent": 0.7,
        "dpo-latent-inverted": 9,
        "dpo-ncp-bf16-probe": None,
    }
    part = dict.fromkeys(("quality", "match", "style"), 0.1)
    for each in runs:
        for measured in each["test"].values():
            measured.update(part)
    monkeypatch.setattr(experiment, "split_scenes", lambda: ([], [], [None] * 2))
    lines = report.table(rows, dict.fromkeys(("best", "base"), {"total": [0.1, 0.1], **part})).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines}
    column = cells["method"].index("at equal time")
    assert cells["linear-latent"][column] == "+0.000" and cells["dpo-ncp-bf16-probe"][column].strip() == ""
