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

"""Kills training runs at random moments and resumes them: `python benchmarks/kill_and_resume.py`.

Every run saves a checkpoint at every other step, so that many of the moments lie inside saving. A run that resumes on the same
number of processes must end with the weights of the run that nobody killed, bit by bit. Runs on one and on two processes that
resume on the other number must do so to rounding. The result goes to standard output as a table.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_checkpoints  # noqa: E402
import train_ncp_dpo_sd15  # noqa: E402
from conftest import deviation, free_port  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


# Of a step, whatever the number of processes.
PAIRS = 4
SAME = ["--use_8bit_adam"]
# An update from random weights is decided by rounding, unless the winners' error is most of the loss.
OTHER = ["--loss_type", "cpo", "--beta_dpo", "100", "--loss_space", "latent"]
# In relation to the size of the update.
ROUNDING = 1e-2


def start(output_dir, checkpoint, dataset, flags, num_processes=1):
    """A run of so many processes, forked so that nothing is imported again. Returns their ids."""
    process_ids, port = [], free_port()
    for rank in range(num_processes):
        process_ids.append(os.fork())
        if process_ids[-1] == 0:
            log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if num_processes > 1:
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_processes)}
                os.environ |= {**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
            options = {
                "pretrained_model_name_or_path": checkpoint,
                "dataset_name": dataset,
                "resolution": tiny_checkpoints.RESOLUTION,
                "train_batch_size": PAIRS // num_processes,
                "max_train_steps": 20,
                "checkpointing_steps": 2,
                "checkpoints_total_limit": 2,
                "learning_rate": 1e-3,
                "ncp_error_scale": 3000,
                "seed": 0,
                "output_dir": output_dir,
                "resume_from_checkpoint": "latest",
            }
            words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
            try:
                train_ncp_dpo_sd15.main(train_ncp_dpo_sd15.parse_args([*words, *flags]))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return process_ids


def finish(process_ids):
    return [os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) for process_id in process_ids]


def kill(process_ids, seconds):
    """Kills the processes after so many seconds. Whether one of them was still running."""
    time.sleep(seconds)
    for process_id in process_ids:
        os.kill(process_id, signal.SIGKILL)
    return -signal.SIGKILL in finish(process_ids)


def load(output_dir):
    return load_file(output_dir / "pytorch_lora_weights.safetensors")


def is_equal(lora, expected):
    return all(torch.equal(lora[name], expected[name]) for name in expected)


def is_near(lora, expected):
    return deviation(lora, expected) < ROUNDING


def main(args):
    torch.set_num_threads(1)
    rng, ends = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = tiny_checkpoints.build_sd15(folder / "base"), tiny_checkpoints.build_parquet(folder / "pairs")
        print("| processes | killed inside saving | resumed runs that ended | weights of the unbroken run |")
        print("|---|---|---|---|")
        for processes, flags, is_same, kills in [
            ((1, 1), SAME, is_equal, args.kills),
            ((1, 2), OTHER, is_near, args.other_kills),
            ((2, 1), OTHER, is_near, args.other_kills),
        ]:
            name, begin = "-".join(map(str, processes)), time.monotonic()
            assert finish(start(folder / name, *data, flags, processes[0])) == [0] * processes[0]
            duration, expected, counts = time.monotonic() - begin, load(folder / name), [0, 0, 0]
            for index in tqdm(range(kills), desc=name):
                output_dir = folder / f"{name}-{index}"
                while not kill(start(output_dir, *data, flags, processes[0]), rng.uniform(0.2, 1) * duration):
                    # It had ended before: it was faster than the run that nobody killed.
                    shutil.rmtree(output_dir)
                    duration *= 0.9
                counts[0] += any(output_dir.glob("incomplete-checkpoint-*"))
                if not any(finish(start(output_dir, *data, flags, processes[1]))):
                    counts[1] += 1
                    counts[2] += is_same(load(output_dir), expected)
            way = "bit by bit" if is_same is is_equal else "to rounding"
            print(
                f"| {' → '.join(map(str, processes))} | {' | '.join(map(str, counts))} of {kills} {way} |", flush=True
            )
            ends.append(counts[2] == kills)
    sys.exit(not all(ends))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="Of runs that resume on as many processes.")
    parser.add_argument("--other_kills", type=int, default=10, help="Of runs that resume on others, each way.")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
