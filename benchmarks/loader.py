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

"""Whether loading images hides behind the step: `python benchmarks/loader.py`; a minute, and two cores or more.

The step is a stub that waits as long as `--step_seconds`, as the main process waits for a GPU. Batches of 8 pairs of JPEGs of
1024² come from the trainer's own loader, over two epochs; the first batch, for which workers have to start, does not count. An
epoch of the stub alone is what would be paid if loading were free. The table goes to standard output.
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

import torch  # noqa: E402
import train_ncp_dpo_sdxl as script  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from encoded_data import write_pairs  # noqa: E402


BATCH_SIZE, RESOLUTION, NUM_EPOCHS = 8, 1024, 2
VAE_CONFIG = {"latent_channels": 4, "downscaling_factor": 8}


def measure(args, folder, num_workers):
    """Seconds per step, each with its batch."""
    words = ["--pretrained_model_name_or_path", "none", "--dataset_name", folder, "--cache_dir", f"{folder}/cache"]
    words += ["--resolution", RESOLUTION, "--train_batch_size", BATCH_SIZE, "--dataloader_num_workers", num_workers]
    words += ["--seed", 0, "--max_train_steps", NUM_EPOCHS * args.batches]
    arguments = script.parse_args(list(map(str, words)))
    accelerator = Accelerator()
    pairs, _ = script.open_pairs(arguments, accelerator, torch.arange(1000), VAE_CONFIG)
    dataloader = script.create_dataloader(arguments, pairs)
    prepared, state = accelerator.prepare(dataloader), {"global_step": 0}
    start = None
    for _ in script.remaining_batches(arguments, accelerator, prepared, dataloader.sampler, state):
        start = start or time.perf_counter()
        time.sleep(args.step_seconds)
        state["global_step"] += 1
    # The first step's batch was there before the clock.
    return (time.perf_counter() - start) / state["global_step"]


def main(args):
    print("| workers | s per step | over the stub alone |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), BATCH_SIZE * args.batches, side=RESOLUTION)
        for num_workers in args.workers:
            seconds = measure(args, folder, num_workers)
            print(f"| {num_workers} | {seconds:.3f} | {seconds / args.step_seconds - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step_seconds", type=float, default=0.3)
    parser.add_argument("--batches", type=int, default=20, help="of an epoch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    main(parser.parse_args())
