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

"""Measures whether loading images hides behind the training step. It takes a minute and needs two cores or more.

    python benchmarks/loader.py

The step only waits for `--step_seconds`, as the main process waits for a GPU. Batches of 8 pairs of JPEGs of 1024² come from
the trainers' own loader, over two epochs. The first batch does not count, since workers start with it. The table, on standard
output, compares a step with one for which loading is free.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path


for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
    os.environ.setdefault(name, "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import preference_pairs  # noqa: E402
import torch  # noqa: E402
import train_ncp_dpo_sdxl  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from encoded_data import write_pairs  # noqa: E402


BATCH_SIZE, RESOLUTION, NUM_EPOCHS = 8, 1024, 2
VAE_CONFIG = {"latent_channels": 4, "downscaling_factor": 8}


def measure(args, folder, num_workers):
    """Seconds per step, including its batch."""
    words = ["--pretrained_model_name_or_path", "none", "--dataset_name", folder, "--cache_dir", f"{folder}/cache"]
    words += ["--resolution", RESOLUTION, "--train_batch_size", BATCH_SIZE, "--dataloader_num_workers", num_workers]
    train_args = train_ncp_dpo_sdxl.parse_args(list(map(str, [*words, "--seed", 0])))
    pairs, _ = preference_pairs.open_pairs(train_args, VAE_CONFIG, torch.arange(1000), winner_only=False)
    num_steps, start = NUM_EPOCHS * args.batches, None
    dataloader = preference_pairs.create_dataloader(train_args, pairs, 0, num_steps * BATCH_SIZE)
    for _ in Accelerator().prepare(dataloader):
        start = start or time.perf_counter()
        time.sleep(args.step_seconds)
    return (time.perf_counter() - start) / num_steps


def main(args):
    print("| workers | s per step | more than without loading |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), BATCH_SIZE * args.batches, side=RESOLUTION)
        for num_workers in args.workers:
            seconds = measure(args, folder, num_workers)
            print(f"| {num_workers} | {seconds:.3f} | {seconds / args.step_seconds - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--step_seconds", type=preference_pairs.POSITIVE, default=0.3, help="Default: 0.3.")
    add("--batches", type=preference_pairs.COUNT, default=20, help="Batches per epoch. Default: 20.")
    add("--workers", type=preference_pairs.INDEX, nargs="+", default=[0, 2], help="Default: 0 2.")
    main(parser.parse_args())
