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

import numpy as np
import protocol
import pytest
import report
from conftest import ROOT
from doc_tables import write_table


def run(method, seed, rewards, seconds_per_step):
    """Returns a run with the same reward for both pictures of one caption."""
    test = {str(step): {"total": [reward, reward]} for step, reward in zip(protocol.STEPS, rewards)}
    result = {"method": method, "seed": seed, "learning_rate": 5e-4, "beta": 200}
    return {**result, "seconds_per_step": seconds_per_step, "test": test}


@pytest.fixture
def rows(monkeypatch):
    """Two trainings of two methods. The best step of latent DPO is the second, that of NCP the third."""
    best_steps = {"dpo-latent": 150, "dpo-ncp": 225}
    monkeypatch.setattr(protocol, "choose", lambda method, load: (5e-4, 200, protocol.STEPS, best_steps[method]))
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
    monkeypatch.setattr(protocol, "choose", lambda method, load: (5e-4, 200, protocol.STEPS, 150))
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
    # There are two captions with two pictures each. One caption wins 1.5 pictures of two, the other 1 of two.
    ours, theirs = [np.array([[1.0, 3], [2, 4]])], [np.array([[0.0, 3], [1, 5]])]
    assert report.win_rate(ours, theirs) == "62% (25% – 100%)"
    # More pictures of as many captions make it no surer, nor do trainings with the same pictures.
    assert report.win_rate(3 * ours, 3 * theirs) == "62% (25% – 100%)"


def test_win_rate_knows_that_trainings_differ():
    # One training wins every caption, and the other loses every caption.
    ours, theirs = [np.ones((1, 200)), np.zeros((1, 200))], [np.zeros((1, 200)), np.ones((1, 200))]
    assert report.win_rate(ours, theirs) == "50% (0% – 100%)"


def test_rows_whose_steps_compute_the_same_share_their_times(monkeypatch):
    monkeypatch.setattr(protocol, "choose", lambda method, load: (5e-4, 200, protocol.STEPS, 150))
    seconds = {
        "dpo-latent": 1,
        "linear-latent": 3,
        "simpo-latent": 0.7,
        "dpo-ncp-bf16-probe": None,
        # Withdrawn methods: one whose steps were those of latent DPO, and one with steps of its own.
        "dpo-latent-balanced": 2,
        "dpo-latent-inverted": 9,
    }
    runs = [run(method, 0, (0.1, 0.2, 0.3), value) for method, value in seconds.items()]
    del runs[3]["seconds_per_step"]  # as if another machine had made it
    rows = report.load_rows(runs)
    assert {name: row.seconds_per_step for name, row in rows.items()} == {
        "dpo-latent": 2,
        "simpo-latent": 0.7,
        "linear-latent": 2,
        "dpo-ncp-bf16-probe": None,
        "dpo-latent-balanced": 2,
        "dpo-latent-inverted": 9,
    }
    for each in runs:
        for measured in each["test"].values():
            measured.update(dict.fromkeys(report.PARTS, 0.1))
    monkeypatch.setattr(protocol, "split_scenes", lambda: ([], [], [None] * 2))
    cells = {name: report.row_cells(row, rows["dpo-latent"], {"total": [0.1, 0.1]}) for name, row in rows.items()}
    assert cells["linear-latent"]["at equal time"] == "+0.000"
    assert "at equal time" not in cells["dpo-ncp-bf16-probe"]


def test_rounds():
    base, gains = {0: [0.1, 0.5], 1: [0.3, 0.3]}, {"base": 0, "round 1": 0.1, "round 2": 0.3, "round 3": 0.3}
    gains |= {"control 2": 0.1, "control 3": 0.2}
    settings = {"num_scenes": 4, "pictures_per_scene": 2, "steps": 3, "learning_rate": 1e-3, "beta_dpo": 200}
    results = []
    for seed, totals in base.items():
        rewards = {
            name: {"total": 20 * [value + (1 + seed) * gain for value in totals], **dict.fromkeys(report.PARTS, gain)}
            for name, gain in gains.items()
        }
        results.append({"settings": settings, "rewards": rewards})
    text = report.describe_rounds(results)
    assert "| round 2 | 0.750 ± 0.150 | 0.300 ± 0.000 |" in text
    assert "| round 2 | control 2 | +0.300 ± 0.100 | 100% (100% – 100%) |" in text
    assert "| round 3 | round 2 | +0.000 ± 0.000 | 50% (50% – 50%) |" in text


@pytest.fixture(scope="module")
def tables():
    return report.document_tables()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/upstream_README.md"])
def test_documents_hold_the_measured_tables(tables, page):
    held = {
        name: write_table(file, name, report.COMMAND, text, check=True)
        for (file, name), text in tables.items()
        if file == ROOT / page
    }
    assert held and all(held.values()), f"run {report.COMMAND}: {held}"


@pytest.mark.parametrize("folder", [protocol.RESULTS, report.STRONG_RESULTS])
def test_reports_are_of_the_runs(folder):
    assert (folder / "README.md").read_text() == report.describe(report.load_results(folder), folder)


def test_the_report_of_rounds_is_of_its_runs():
    assert (protocol.RESULTS / "rounds.md").read_text() == report.describe_rounds(report.load_rounds(protocol.RESULTS))


def test_withdrawn_methods_keep_their_numbers(tables):
    lines = [line.split(" | ") for line in tables[ROOT / "docs/results.md", "small-world-withdrawn"].splitlines()[2:]]
    assert {line[0].lstrip("| "): line[6] for line in lines} == {
        "dpo-latent-balanced": "-0.011 ± 0.010",
        "dpo-ncp-balanced": "-0.017 ± 0.010",
        "dpo-latent-profile": "+0.009 ± 0.007",
        "dpo-latent-safeguard": "-0.056 ± 0.030",
        "dpo-ncp-safeguard": "-0.056 ± 0.015",
        "dpo-sum": "-0.038 ± 0.011",
        "dpo-latent-inverted": "-0.004 ± 0.008",
    }
