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
import studies
from conftest import ROOT
from doc_tables import write_table


@pytest.fixture
def one_caption(monkeypatch):
    monkeypatch.setattr(protocol, "split_scenes", lambda: ([], [], [None]))


def run(method, seed, rewards, seconds_per_step):
    """Returns a run with the same reward for both pictures of one caption."""
    test = {str(step): {"total": [reward, reward]} for step, reward in zip(protocol.STEPS, rewards)}
    result = {"method": method, "seed": seed, "learning_rate": 5e-4, "beta": 200}
    return {**result, "seconds_per_step": seconds_per_step, "test": test}


@pytest.fixture
def rows(monkeypatch, one_caption):
    """Two trainings of two methods. The best step of latent DPO is the second, that of NCP the third."""
    best_steps = {"dpo-latent": 150, "dpo-ncp": 225}
    monkeypatch.setattr(protocol, "choose", lambda method, load: (5e-4, 200, protocol.STEPS, best_steps[method]))
    latent = [run("dpo-latent", seed, (0.3, 0.4, 0.2), 1) for seed in (0, 1)]
    ncp = [run("dpo-ncp", seed, (0.3, 0.5, last), 2) for seed, last in ((0, 0.6), (1, 0.8))]
    return report.Row("dpo-latent", latent), report.Row("dpo-ncp", ncp)


def test_differences_at_the_best_at_equal_steps_and_at_equal_time(rows):
    latent, ncp = rows
    assert report.difference(ncp, latent) == pytest.approx(np.array([[0.2], [0.4]]))
    # The t quantile of two trainings is 12.7.
    assert report.interval_text(report.difference(ncp, latent), "+") == "+0.300 (-0.971 to +1.571)"
    assert report.difference(ncp, latent, 150, 150) == pytest.approx(np.array([[0.1], [0.1]]))
    # While latent DPO makes 150 steps, NCP makes 75.
    assert report.difference_at_equal_time(ncp, latent) == pytest.approx(np.array([[-0.1], [-0.1]]))
    # Or 112.5, between 75 and 150.
    ncp.seconds = [4 / 3]
    assert report.difference_at_equal_time(ncp, latent) == pytest.approx(np.array([[0.0], [0.0]]))


def test_comparisons_say_where_a_method_was_not_trained_or_is_past_its_best(rows):
    latent, ncp = rows
    assert report.equal_time_cell(ncp, latent) == "-0.100 (-0.100 to -0.100)"
    # While NCP makes its 225 steps, latent DPO makes 450, and at equal steps it is past its best.
    assert report.equal_time_cell(latent, ncp) == "not measured: needs 450 steps, has 225"
    ncp.seconds = [1]
    assert report.equal_time_cell(latent, ncp) == "-0.500 (-1.771 to +0.771), past its best step, 150"
    for row in (latent, ncp):
        for seed in row.tested:
            row.tested[seed]["test"][str(row.step)].update(dict.fromkeys(report.PARTS, 0.1))
    assert report.row_cells(latent, ncp, {})["at equal steps"] == "-0.500 (-1.771 to +0.771), past its best step, 150"
    assert report.row_cells(ncp, latent, {})["at equal steps"] == "+0.100 (+0.100 to +0.100)"


def test_each_training_is_compared_with_the_base_from_its_own_noise(rows):
    _, ncp = rows
    references = {"base": {"total": [0.1, 0.3]}, "base-1": {"total": [0.3, 0.3]}}
    assert report.difference_from_base(ncp, references) == pytest.approx(np.array([[0.4], [0.5]]))
    del references["base-1"]
    assert report.difference_from_base(ncp, references) is None


def test_what_is_said_of_a_difference():
    surely, hardly = np.array([[0.10], [0.11], [0.12]]), np.array([[0.01], [0.11], [0.18]])
    level = np.array([[-0.005], [0.0], [0.004]])
    # Holm: the smallest p value counts as often as there are comparisons.
    p_values = report.adjusted_p_values({"hardly": hardly, "surely": surely, "level": level})
    alone = {
        name: report.adjusted_p_values({name: table})[name] for name, table in (("surely", surely), ("hardly", hardly))
    }
    assert p_values["surely"] == pytest.approx(3 * alone["surely"])
    assert p_values["hardly"] == pytest.approx(2 * alone["hardly"])
    assert report.verdict(surely, p_values["surely"]) == "ahead"
    assert report.verdict(-surely, p_values["surely"]) == "behind"
    assert report.verdict(surely, 0.05) == report.verdict(hardly, p_values["hardly"]) == "not known"
    assert report.verdict(level, p_values["level"]) == "level"
    assert report.verdict(level + 0.015, 1) == "not known"


def test_what_is_learnt_of_pairs_labelled_by_one_part(monkeypatch, one_caption):
    monkeypatch.setattr(protocol, "choose", lambda method, load: (5e-4, 200, protocol.STEPS, 150))
    rows = {}
    for space, matches in (("latent", (0.5, 0.7)), ("ncp", (0.6, 0.9))):
        method, runs = f"dpo-{space}-by-match", []
        for seed, match in enumerate(matches):
            runs.append(run(method, seed, (0.1, 0.1, 0.1), 1))
            runs[-1]["test"]["150"]["match"] = match
        rows[method] = report.Row(method, runs)
    latent, ncp = report.labels_table(rows, {"base": {"match": 0.4}, "base-1": {"match": 0.5}}).splitlines()[2:]
    assert latent == "| match | dpo-latent | 2 | 0.0005 | 200 | 150 | 0.450 | 0.600 (-0.671 to 1.871) |  |"
    assert (
        ncp
        == "| match | dpo-ncp | 2 | 0.0005 | 200 | 150 | 0.450 | 0.750 (-1.156 to 2.656) | +0.150 (-0.485 to +0.785) |"
    )


def test_wins():
    # There are two captions with two pictures each. One caption wins 1.5 pictures of two, the other 1 of two.
    ours, theirs = [np.array([[1.0, 3], [2, 4]])], [np.array([[0.0, 3], [1, 5]])]
    assert report.wins(ours, theirs) == pytest.approx(np.array([[1.0, 0.25]]))
    assert report.wins_text(ours, theirs).startswith("62% (")


def test_wins_know_that_trainings_differ():
    # One training wins every caption, and the other loses every caption.
    ours, theirs = [np.ones((1, 200)), np.zeros((1, 200))], [np.zeros((1, 200)), np.ones((1, 200))]
    assert report.wins_text(ours, theirs) == "50% (0% to 100%)"


def test_rows_whose_steps_compute_the_same_share_their_times(monkeypatch, one_caption):
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
    cells = {name: report.row_cells(row, rows["dpo-latent"], {}) for name, row in rows.items()}
    assert cells["linear-latent"]["at equal time"].startswith("+0.000")
    assert cells["dpo-ncp-bf16-probe"]["at equal time"] == "not measured"


def test_rounds(one_caption):
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
    assert "| round 2 | 0.750 (-1.156 to 2.656) | 0.300 |" in text
    assert "| round 2 | control 2 | +0.300 (-0.971 to +1.571) | 100% (" in text
    assert "| round 3 | round 2 | +0.000 (+0.000 to +0.000) | 50% (" in text


def test_a_study_is_reported_when_it_is_complete(one_caption, monkeypatch):
    rows = {name: studies.Row(f"dpo-{name}", judge="second") for name in ("latent", "ncp")}
    study = studies.Study(rows, range(10, 13), [(("tiny", "ncp"), ("tiny", "latent"))])
    # Fewer seeds, and a comparison with the other study.
    few = studies.Study({"ncp": rows["ncp"]}, range(10, 12), [(("few", "ncp"), ("tiny", "latent"))])
    monkeypatch.setattr(studies, "STUDIES", {"tiny": study, "few": few})
    parts, runs = {"quality": 0.1, "match": 0.2, "style": 0.3}, {}
    for seed in study.seeds:
        runs[studies.base_name("second", seed)] = {"total": [seed / 100, seed / 100]}
        for name, gain in (("latent", 0.1), ("ncp", 0.2)):
            # Its three checkpoints differ, and trainings of NCP differ a little more.
            rewards = [
                seed / 100 + gain + change + (seed - 11) / 1000 * (name == "ncp") for change in (-0.05, 0, 0.05)
            ]
            test = {str(step): {"total": [reward, reward], **parts} for step, reward in zip((125, 150, 175), rewards)}
            run = {"learning_rate": 1e-3, "beta": 200, "test": test}
            runs[studies.run_name("tiny", name, seed)] = run
            if name == "ncp" and seed in few.seeds:
                runs[studies.run_name("few", name, seed)] = run
    text = report.describe_fresh(runs)
    assert (
        "| latent | 3 | 0.001 | 200 | 125, 150, 175 | 0.210 (0.185 to 0.235) | 0.100 | 0.200 | 0.300 | +0.100 ("
        in text
    )
    assert "| ncp | latent | +0.100 (+0.098 to +0.102) | 0.000 | ahead |" in text
    assert "## few" in text and "| ncp | latent | +0.099 (" in text
    del runs["tiny-ncp-12"]
    assert "## tiny" not in report.describe_fresh(runs) and "## few" in report.describe_fresh(runs)


@pytest.fixture(scope="module")
def tables():
    return report.document_tables()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/results_older.md", "docs/upstream_README.md"])
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
    lines = tables[ROOT / "docs/results_older.md", "small-world-withdrawn"].splitlines()
    place = lines[0].strip("| ").split(" | ").index("over latent DPO")
    cells = [line.lstrip("| ").split(" | ") for line in lines[2:]]
    assert {line[0]: line[place].split()[0] for line in cells} == {
        "dpo-latent-balanced": "-0.011",
        "dpo-ncp-balanced": "-0.017",
        "dpo-latent-profile": "+0.009",
        "dpo-latent-safeguard": "-0.056",
        "dpo-ncp-safeguard": "-0.056",
        "dpo-sum": "-0.038",
        "dpo-latent-inverted": "-0.004",
    }
