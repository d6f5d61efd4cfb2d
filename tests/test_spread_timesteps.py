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

"""Tests the evenly spread timesteps of `preference_pairs.spread_timesteps`."""

import pytest
import torch
from preference_pairs import spread_timesteps


@pytest.mark.parametrize(("first", "last"), [(0, 999), (400, 999), (7, 7), (0, 4)])
def test_timesteps_cover_their_range_evenly_wherever_the_sequence_ends(first, last):
    everything = torch.arange(first, last + 1)
    parts = [spread_timesteps(everything, start, 16, 0.3) for start in range(0, 256, 16)]
    assert torch.equal(torch.cat(parts), spread_timesteps(everything, 0, 256, 0.3))
    for count in (16, 100, 256):
        timesteps = torch.cat(parts)[:count]
        assert timesteps.dtype == torch.int64 and timesteps.min() >= first and timesteps.max() <= last
        bins = min(8, last - first + 1)
        counts = torch.bincount((timesteps - first) * bins // (last - first + 1), minlength=bins)
        assert (counts - count / bins).abs().max() <= 2


def test_other_offsets_give_other_timesteps():
    timesteps = torch.arange(1000)
    assert not torch.equal(spread_timesteps(timesteps, 0, 64, 0.1), spread_timesteps(timesteps, 0, 64, 0.2))
