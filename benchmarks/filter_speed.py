#!/usr/bin/env python
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
Measures time and peak memory of `prepare_preferences.py filter` on generated rows of Pick-a-Pic v2's schema.

    python benchmarks/filter_speed.py --rows 1000000

The rows come from simulated sessions: under a prompt, the winner of each comparison meets a new image. An image is a few
random bytes, which the command does not read.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd


TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from common import COUNT  # noqa: E402


SCRIPT = TOOLS / "prepare_preferences.py"
ROWS_PER_PROMPT, TIES, NUM_FILES = 16, 0.12, 8


def write_rows(path, first_row, num_rows, image_bytes):
    """Writes `num_rows` rows in sessions of `ROWS_PER_PROMPT`, numbered from `first_row`, to a parquet file."""
    rng = np.random.default_rng(first_row)
    row = np.arange(first_row, first_row + num_rows)
    prompt = row // ROWS_PER_PROMPT
    label = rng.choice([0.0, 1.0, 0.5], num_rows, p=[(1 - TIES) / 2, (1 - TIES) / 2, TIES])

    # The newcomer of row n is image n. It meets the winner of row n - 1, or another new image if a session starts.
    kept, best = np.empty(num_rows, dtype=np.int64), None
    for index, (starts, newcomer_wins) in enumerate(zip(row % ROWS_PER_PROMPT == 0, label == 0)):
        kept[index] = -row[index] - 1 if starts or best is None else best
        best = row[index] if newcomer_wins else kept[index]

    def uids(numbers):
        return [f"{number & 0xFFFFFFFFFFFF:012x}-4c1d-4b0e-9a55-{number & 0xFFFFFFFFFFFF:012x}" for number in numbers]

    best = np.where(label == 1, kept, row)
    columns = {
        "are_different": True,
        "best_image_uid": uids(best),
        "caption": [
            f"prompt {number}: a portrait of a lighthouse keeper, oil on canvas, warm light" for number in prompt
        ],
        "created_at": pd.Timestamp("2023-03-20") + pd.to_timedelta(row, unit="s"),
        "has_label": True,
        "image_0_uid": uids(kept),
        "image_0_url": [f"https://example.com/stability-images/{uid}.png" for uid in uids(kept)],
        "image_1_uid": uids(row),
        "image_1_url": [f"https://example.com/stability-images/{uid}.png" for uid in uids(row)],
        "jpg_0": [rng.bytes(image_bytes) for _ in row],
        "jpg_1": [rng.bytes(image_bytes) for _ in row],
        "label_0": label,
        "label_1": 1 - label,
        "model_0": "stabilityai/stable-diffusion-2-1",
        "model_1": "dreamlike-art/dreamlike-photoreal-2.0",
        "ranking_id": row,
        "user_id": prompt % 4000,
        "num_example_per_prompt": ROWS_PER_PROMPT,
        "__index_level_0__": row,
    }
    pd.DataFrame(columns).to_parquet(path, index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=COUNT, default=1_000_000, help="Default: 1000000.")
    parser.add_argument("--image_bytes", type=COUNT, default=256, help="Size of a generated image. Default: 256.")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as output:
        # In processes of their own, because a new process counts its parent's peak memory as its own.
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            bounds = np.linspace(0, args.rows, NUM_FILES + 1, dtype=int)
            paths = [Path(folder, f"train-{index:05d}-of-{NUM_FILES:05d}.parquet") for index in range(NUM_FILES)]
            list(pool.map(write_rows, paths, bounds[:-1], np.diff(bounds), [args.image_bytes] * NUM_FILES))
        size = sum(path.stat().st_size for path in paths)
        print(f"{args.rows:,} rows in {size / 2**20:,.0f} MiB of parquet files", flush=True)

        command = [sys.executable, str(SCRIPT), "filter", "--dataset_name", folder, "--cache_dir", output]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--output_file", str(Path(output, "kept.parquet"))])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s, {usage.ru_maxrss / 2**20:.2f} GiB peak memory")  # ru_maxrss is in KiB
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
