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

"""Kills a training run at random moments and resumes it: `python benchmarks/kill_and_resume.py`.

Every run saves a checkpoint at every other step, so that many of the moments lie inside saving. Each time the resumed run must
end with the weights of the run that nobody killed, bit by bit. The result goes to standard output as a table.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_checkpoints  # noqa: E402
import train_ncp_dpo_sd15  # noqa: E402


def start(output_dir, checkpoint, dataset):
    """A run in a process of its own, forked so that nothing is imported again. Returns its process id."""
    process_id = os.fork()
    if process_id:
        return process_id
    log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = {
        "pretrained_model_name_or_path": checkpoint,
        "dataset_name": dataset,
        "resolution": tiny_checkpoints.RESOLUTION,
        "train_batch_size": 2,
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
    train_ncp_dpo_sd15.main(train_ncp_dpo_sd15.parse_args(["--use_8bit_adam", *words]))
    os._exit(0)


def finish(process_id):
    _, status = os.waitpid(process_id, 0)
    return os.waitstatus_to_exitcode(status)


def load(output_dir):
    return safetensors.torch.load_file(output_dir / "pytorch_lora_weights.safetensors")


def main(args):
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        checkpoint = tiny_checkpoints.build_sd15(folder / "base")
        dataset = tiny_checkpoints.build_parquet(folder / "pairs")
        begin = time.monotonic()
        assert finish(start(folder / "uninterrupted", checkpoint, dataset)) == 0
        duration = time.monotonic() - begin
        expected = load(folder / "uninterrupted")

        counts = dict.fromkeys(
            ["killed", "killed inside saving", "resumed runs that ended", "bit-identical weights"], 0
        )
        for index in tqdm(range(args.kills), desc="Kills"):
            output_dir = folder / f"run-{index}"
            process_id = start(output_dir, checkpoint, dataset)
            time.sleep(rng.uniform(0.2, 1) * duration)
            os.kill(process_id, signal.SIGKILL)
            counts["killed"] += finish(process_id) == -signal.SIGKILL
            counts["killed inside saving"] += any(output_dir.glob("incomplete-checkpoint-*"))
            if finish(start(output_dir, checkpoint, dataset)) == 0:
                counts["resumed runs that ended"] += 1
                weights = load(output_dir)
                counts["bit-identical weights"] += all(torch.equal(weights[name], expected[name]) for name in expected)

    print(f"| {args.kills} kills at random moments (seed {args.seed}) | |\n|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count} |")
    sys.exit(counts["bit-identical weights"] != args.kills)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
