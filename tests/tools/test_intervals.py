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


import math

import numpy as np
import pytest
from intervals import mean_interval, variance_of_mean, win_rate_interval
from scipy import stats


def test_one_training_is_students_interval_of_the_prompts():
    scores = np.random.default_rng(0).normal(size=12)
    expected = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    for table in (scores, scores[None]):
        assert mean_interval(table) == pytest.approx((scores.mean(), *expected))


def test_values_of_trainings_alone_are_students_interval():
    means = [0.4, 0.5, 0.9]
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert mean_interval([[value] for value in means]) == pytest.approx((0.6, *expected))
    # Prompts that do not differ add nothing.
    assert mean_interval([7 * [value] for value in means]) == pytest.approx((0.6, *expected))


def test_variances_of_trainings_and_prompts_add_up():
    # Their means are 2 and 4, and 1, 3 and 5.
    variance, freedom = variance_of_mean([[0, 2, 4], [2, 4, 6]])
    trainings, prompts = 2 / 2, 4 / 3
    assert variance == pytest.approx(trainings + prompts)
    assert freedom == pytest.approx((trainings + prompts) ** 2 / (trainings**2 / 1 + prompts**2 / 2))


def test_one_value_has_no_interval():
    assert mean_interval([[2.0]]) == (2, -math.inf, math.inf)
    assert win_rate_interval([1]) == (1, 0, 1)


def test_win_rate_of_one_picture_a_prompt_is_wilsons():
    quantile = stats.t.ppf(0.975, 9)
    for wins in (8, 10):
        # Wilson's interval is where the score test rejects no rate: (p - rate)² = t² · rate · (1 - rate) / m.
        p = wins / 10
        roots = np.roots([1 + quantile**2 / 10, -2 * p - quantile**2 / 10, p**2])
        assert win_rate_interval([1] * wins + [0] * (10 - wins)) == pytest.approx((p, *sorted(roots)))


def test_win_rate_is_no_surer_by_more_pictures_of_a_prompt():
    wins = np.array([1, 0, 0.5, 1, 1, 0.75])
    rate, low, high = win_rate_interval(wins)
    assert rate == pytest.approx(17 / 24)
    # The same as of one picture a prompt with the same variance.
    effective = rate * (1 - rate) / (wins.var(ddof=1) / 6) * 6 / 5
    quantile = stats.t.ppf(0.975, 5)
    for end in (low, high):
        assert (end - rate) ** 2 == pytest.approx(quantile**2 * end * (1 - end) / effective)


def test_win_rate_knows_that_trainings_differ():
    # One training wins every prompt, the other none.
    rate, low, high = win_rate_interval([[1] * 200, [0] * 200])
    assert rate == 0.5 and low < 0.01 and high > 0.99


def test_equal_win_rates_of_all_prompts_leave_an_interval():
    one_picture = [1] * 7 + [0] * 3
    assert win_rate_interval(10 * [0.7]) == pytest.approx(win_rate_interval(one_picture))


@pytest.mark.parametrize(
    "num_trainings, num_prompts, trainings, prompts, pictures, expected",
    [
        (1, 30, 0, 0.2, 0.3, (0.94, 0.96)),
        (3, 30, 0.1, 0.2, 0.3, (0.93, 0.98)),
        # The interval of the trainings' means alone covers 36 %.
        (5, 30, 0.02, 0.4, 0.1, (0.94, 0.97)),
        (5, 30, 0.3, 0.1, 0.3, (0.94, 0.97)),
    ],
)
def test_coverage(num_trainings, num_prompts, trainings, prompts, pictures, expected):
    rng, num_tables = np.random.default_rng(0), 3000
    tables = rng.normal(0, pictures, (num_tables, num_trainings, num_prompts))
    tables += rng.normal(0, trainings, (num_tables, num_trainings, 1)) + rng.normal(
        0, prompts, (num_tables, 1, num_prompts)
    )
    intervals = map(mean_interval, tables)
    covered = np.mean([low <= 0 <= high for _, low, high in intervals])
    assert expected[0] <= covered <= expected[1]
