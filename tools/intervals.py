# coding=utf-8
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

"""
95 % confidence intervals of means and win rates over trainings and prompts.

Every function takes a table with one row for each training and one column for each prompt. All trainings draw the same
prompts. A cell is the mean over the pictures of a prompt, so several pictures of a prompt count as one observation.

For n trainings and m prompts, the variance of the table's mean is estimated by

    V = V_t + V_p,    V_t = s_t² / n,    V_p = s_p² / m,

with s_t² the variance of the trainings' means (n - 1 degrees of freedom) and s_p² that of the prompts' means (m - 1 degrees).
The quantile is Student's t with the degrees of freedom of Welch (1947) and Satterthwaite (1946),

    V² / (V_t² / (n - 1) + V_p² / (m - 1)).

With one training, only V_p is left: the usual interval clustered by prompt, which says nothing about other trainings. If
trainings differ much more than prompts do, the interval is that of the trainings' means. The interval of the trainings' means is
too narrow in general, because all trainings share their prompts. In simulations, intervals of three or more trainings cover the
truth in 93 % to 99 % of all cases. Those of two trainings cover it in 85 % only, if the trainings differ much.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


QUANTILE = 0.975


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % confidence interval."""

    estimate: float
    low: float
    high: float


def variance_of_mean(table):
    """
    The variance V of a table's mean, and its degrees of freedom.

    Args:
        table (array of shape `(trainings, prompts)`): see above; an array of shape `(prompts,)` is one training.

    Returns:
        `tuple`: V and its degrees of freedom, NaN and 0 if the table has one cell.
    """
    table = np.atleast_2d(np.asarray(table, dtype=float))
    parts = [
        (float(means.var(ddof=1)) / len(means), len(means) - 1)
        for means in (table.mean(axis=1), table.mean(axis=0))
        if len(means) > 1
    ]
    if not parts:
        return math.nan, 0
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0, max(freedom for _, freedom in parts)
    return variance, variance**2 / sum(part**2 / freedom for part, freedom in parts)


def mean_interval(table):
    """
    The mean of a table, for example of scores or of differences of scores, with its 95 % interval mean ± t · √V.

    Args:
        table (array of shape `(trainings, prompts)`): one value for each training and prompt; an array of shape `(prompts,)` is
            one training. For a value of each training alone, the shape is `(trainings, 1)`.

    Returns:
        `Interval`: the interval is infinite if the table has one cell.
    """
    mean = float(np.mean(table))
    variance, freedom = variance_of_mean(table)
    half_width = float(stdtrit(freedom, QUANTILE)) * math.sqrt(variance) if freedom else math.inf
    return Interval(mean, mean - half_width, mean + half_width)


def win_rate_interval(wins):
    """
    The mean of a table of wins, with a 95 % interval that stays in [0, 1] and is not empty if everything is won: Wilson's (1927),

        (p + t²/2k ± t · √(p(1 - p)/k + t²/4k²)) / (1 + t²/k),

    for the win rate p, the t quantile above, and the effective number of prompts k = p(1 - p)/V · m/(m - 1), as for surveys of
    clusters (Dean and Pagano 2015). For one picture of each prompt, one training and no ties, k is m. It is also m if V is 0.

    Args:
        wins (array of shape `(trainings, prompts)`): the share of a prompt's pictures that win, a tie counting one half; an array
            of shape `(prompts,)` is one training.

    Returns:
        `Interval`: from 0 to 1 if the table has one cell.
    """
    rate, num_prompts = float(np.mean(wins)), np.shape(wins)[-1]
    variance, freedom = variance_of_mean(wins)
    if not freedom:
        return Interval(rate, 0.0, 1.0)
    quantile = float(stdtrit(freedom, QUANTILE))
    effective = num_prompts
    # Rounding leaves a variance of about 1e-33 where all cells are equal.
    if variance > 1e-24:
        effective = rate * (1 - rate) / variance * (num_prompts / (num_prompts - 1) if num_prompts > 1 else 1)
    ratio = quantile**2 / effective
    center = (rate + ratio / 2) / (1 + ratio)
    half_width = math.sqrt(ratio * rate * (1 - rate) + ratio**2 / 4) / (1 + ratio)
    return Interval(rate, max(center - half_width, 0.0), min(center + half_width, 1.0))
