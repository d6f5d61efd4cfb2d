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

"""Compares the losses of an epoch between this checkout and another revision of it: both scripts, all losses that are named,
both spaces, tiny models, fp32, one seed and a given error scale.

    python benchmarks/same_training.py --revision 1cba39d

The table goes to standard output. The exit code is 1 if a loss differs by more than 1e-6.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tiny_checkpoints  # noqa: E402


TOLERANCE = 1e-6
SCRIPTS = {"sd15": tiny_checkpoints.build_sd15, "sdxl": tiny_checkpoints.build_sdxl}


def train(checkout, script, checkpoint, pairs, output_dir, loss_type, loss_space):
    """Trains one epoch of 12 pairs, 4 a step, and returns the losses."""
    flags = {
        "pretrained_model_name_or_path": checkpoint,
        "dataset_name": pairs,
        "resolution": tiny_checkpoints.RESOLUTION,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "rank": 4,
        "seed": 0,
        "ncp_error_scale": 1000,
        "loss_type": loss_type,
        "loss_space": loss_space,
        "output_dir": output_dir,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, f"train_ncp_dpo_{script}.py", *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    (logs,) = (path for path in (output_dir / "logs").iterdir() if path.is_dir())
    events = EventAccumulator(str(logs))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def main(args):
    worst = 0.0
    print("| script | loss | space | losses | largest difference |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = folder / "checkout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(other)], check=True)
        subprocess.run(["git", "checkout", "--quiet", args.revision], cwd=other, check=True)
        pairs = tiny_checkpoints.build_parquet(folder / "pairs")
        for script, build in SCRIPTS.items():
            checkpoint = build(folder / script)
            for loss_type in args.loss_types:
                for loss_space in ("latent", "ncp"):
                    before, after = (
                        train(
                            checkout,
                            script,
                            checkpoint,
                            pairs,
                            folder / f"{script}-{loss_type}-{loss_space}-{checkout.name}",
                            loss_type,
                            loss_space,
                        )
                        for checkout in (other, ROOT)
                    )
                    difference = max(abs(a - b) for a, b in zip(before, after, strict=True))
                    worst = max(worst, difference)
                    shown = ", ".join(f"{loss:.6f}" for loss in after)
                    print(f"| {script} | {loss_type} | {loss_space} | {shown} | {difference:.1e} |", flush=True)
    return int(worst > TOLERANCE)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default="1cba39d", help="Git revision to compare with.")
    parser.add_argument("--loss_types", nargs="+", default=["dpo", "cpo", "sft"])
    return parser.parse_args(input_args)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
