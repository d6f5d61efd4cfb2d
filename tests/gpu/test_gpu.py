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

"""Both scripts on a GPU. What a case checks is in `benchmarks/gpu.py`; GPU_TESTS_DEVICE=cpu runs what runs without one."""

import os

import gpu
import pytest
import torch


DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return gpu.Bench(DEVICE, tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("case", gpu.CASES, ids=str)
def test_case(bench, case):
    try:
        gpu.run_case(bench, case)
    except gpu.Skip as reason:
        pytest.skip(str(reason))
