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

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import protocol
import pytest
from scenes import SCENES


def test_scenes_are_split():
    training, choosing, test = protocol.split_scenes()
    assert len(choosing) == len(test) == 40
    assert sorted([*training, *choosing, *test]) == sorted(SCENES)


def tried(table, method="dpo-latent"):
    """Returns what `choose` gives if runs are as good as `table` says, and the settings that it tried."""
    seen = []

    def load(rate, beta, steps):
        seen.append((rate, beta))
        rewards = np.broadcast_to(table[rate, beta], max(len(steps), np.size(table[rate, beta])))
        return {"choosing": {str(step): {"total": [value]} for step, value in zip(steps, rewards)}}

    return protocol.choose(method, load), set(seen)


def test_settings_are_changed_in_turn_as_long_as_that_is_better():
    # The best step counts. Halving is tried where doubling is worse.
    steps = protocol.STEPS
    table = {(5e-4, 200): (0.1, 0.2, 0.3), (1e-3, 200): (0.2, 0.5, 0.1), (2e-3, 200): (0.4, 0.1, 0.1)}
    table |= {(1e-3, 400): 0.4, (1e-3, 100): (0.6, 0.1, 0.1), (1e-3, 50): 0.5, (2e-3, 100): 0.1, (5e-4, 100): 0.6}
    assert tried(table) == ((1e-3, 100, steps, steps[0]), table.keys())
    # The best learning rate is searched again with the best beta.
    table = {
        (5e-4, 200): 0.3,
        (1e-3, 200): 0.2,
        (2.5e-4, 200): 0.2,
        (5e-4, 400): 0.4,
        (5e-4, 800): 0.2,
        (1e-3, 400): 0.5,
    }
    table |= {(2e-3, 400): 0.1, (1e-3, 800): 0.4}
    assert tried(table) == ((1e-3, 400, steps, steps[0]), {*table, (1e-3, 200)})
    # SFT has no beta.
    table = {(5e-4, None): 0.3, (1e-3, None): 0.2, (2.5e-4, None): 0.4, (1.25e-4, None): 0.2}
    assert tried(table, "sft-latent") == ((2.5e-4, None, steps, steps[0]), table.keys())


def test_a_method_is_trained_on_while_its_last_step_is_its_best():
    others = dict.fromkeys([(1e-3, 200), (2.5e-4, 200), (5e-4, 400), (5e-4, 100)], 0.2)
    table = {**others, (5e-4, 200): (0.1, 0.2, 0.3, 0.4, 0.1, 0.9)}
    assert tried(table)[0] == (5e-4, 200, (75, 150, 225, 300, 375), 300)
    # It is not trained on beyond the most steps, nor if the first step is as good as the last.
    assert tried({**others, (5e-4, 200): np.arange(6) + 0.3})[0] == (5e-4, 200, (75, 150, 225, 300, 375, 450), 450)
    assert tried({**others, (5e-4, 200): 0.3})[0] == (5e-4, 200, (75, 150, 225), 75)


@pytest.mark.parametrize("part", ["match", "drawing"])
def test_pairs_labelled_by_one_part_of_the_reward_choose_by_it(part):
    def load(rate, beta, steps):
        # A higher learning rate is better for the match, and a lower one for everything else, to a limit.
        drawing = -max(rate, 1.25e-4)
        measured = {"match": min(rate, 8e-3), "quality": drawing, "style": drawing, "total": [drawing]}
        return {"choosing": {str(step): measured for step in steps}}

    rate, *_ = protocol.choose(f"dpo-ncp-by-{part}", load)
    assert rate == pytest.approx({"match": 8e-3, "drawing": 1.25e-4}[part])


def test_the_last_line_of_a_run_counts(tmp_path):
    file = tmp_path / "results" / "runs.jsonl"
    assert protocol.load_runs(file) == {}
    for run in ({"name": "a", "beta": 1}, {"name": "b", "beta": None}, {"name": "a", "beta": 2.5}):
        protocol.append_run(file, run)
    assert protocol.load_runs(file) == {"a": {"name": "a", "beta": 2.5}, "b": {"name": "b", "beta": None}}


def test_a_line_cut_short_is_ignored_and_overwritten(tmp_path):
    file = tmp_path / "runs.jsonl"
    for name in ("a", "b"):
        protocol.append_run(file, {"name": name, "rewards": [0.5] * 10})
    whole = file.read_bytes()
    for length in (whole.index(b"\n") + 1, whole.index(b"\n") + 5, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert protocol.load_runs(file).keys() == {"a"}
        protocol.append_run(file, {"name": "b", "rewards": [0.5] * 10})
        assert file.read_bytes() == whole


def test_several_workers_append_to_one_file(tmp_path):
    file = tmp_path / "runs.jsonl"
    runs = [{"name": str(index), "rewards": [index] * 5000} for index in range(40)]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(protocol.append_run, [file] * len(runs), runs))
    assert len(file.read_bytes().splitlines()) == len(runs)
    assert protocol.load_runs(file) == {run["name"]: run for run in runs}


@pytest.mark.parametrize("name", ["results", "results_strong"])
def test_committed_runs_are_complete(name):
    file = protocol.RESULTS.with_name(name) / protocol.RUNS_NAME
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    runs = protocol.load_runs(file)
    assert len(lines) == len(runs) and {"base", "base-choosing", "best"} <= runs.keys()
    for run in runs.values():
        assert "command" in run or "method" not in run
