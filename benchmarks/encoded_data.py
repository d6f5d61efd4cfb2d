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

"""Compares encoded data with the `--cache_latents` of commit 00a457c, which they replaced, side by side on one machine.

    python benchmarks/encoded_data.py

It takes some minutes, needs the git history and prints a table. The small world's model encodes pairs of JPEGs of 512² at 96².
Seconds per pair are those of twice as many pairs minus those of once as many, which leaves out the start. Memory is the largest
resident set. The loader's time per pair is measured over whole epochs in batches of 8, noise included, after a first epoch. The
data of SDXL's size are random.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from datasets import Dataset
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import encode_preferences  # noqa: E402
import preference_pairs  # noqa: E402
import train_ncp_dpo_sdxl  # noqa: E402


BEFORE = "00a457c"
MODEL = ROOT / "assets" / "small-world"
BATCH_SIZE, NUM_EPOCHS = 8, 3  # one more epoch comes first and does not count
# Both versions run this to measure their loader. Their part of it creates `batches`.
LOADER = """
import sys, time
sys.path.insert(0, {root!r})
import torch, train_ncp_dpo_sd15 as script
from accelerate import Accelerator
args = script.parse_args(sys.argv[1:])
accelerator = Accelerator(cpu=True)
{create_batches}
for index, batch in enumerate(batches):
    if index == {first}: start, count = time.perf_counter(), 0
    if index >= {first}: count += len(batch["rows"])
print(f"{{(time.perf_counter() - start) / count:.6f}}")
"""
BATCHES_BEFORE = """
noise_scheduler, latent_shape = script.load_configurations(args)
pairs = script.open_pairs(args, accelerator, latent_shape, 1000)
components = script.load_components(args, accelerator, torch.float32)
pairs = script.cache_pairs(args, accelerator, pairs, components, torch.float32)
loader = script.create_dataloader(args, pairs)
def create_batches():
    for loader.sampler.epoch in range({num_epochs} + 1):
        yield from loader
batches = create_batches()
"""
BATCHES_NOW = """
import preference_pairs
_, vae_config, timesteps = script.check_checkpoint(args)
pairs, _ = preference_pairs.open_pairs(args, vae_config, timesteps, False)
batches = preference_pairs.create_dataloader(args, pairs, 0, ({num_epochs} + 1) * len(pairs.rows))
"""


def write_pairs(folder, num_pairs, side=512):
    """Pairs of smooth pictures with some grain, as JPEGs."""
    rng = np.random.default_rng(0)

    def jpeg():
        picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side))
        grain = rng.integers(0, 24, (side, side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(picture) // 2 + grain).save(buffer, "JPEG")
        return buffer.getvalue()

    columns = {"jpg_0": [jpeg() for _ in range(num_pairs)], "jpg_1": [jpeg() for _ in range(num_pairs)]}
    columns |= {"label_0": [1.0] * num_pairs, "caption": [f"caption {index}" for index in range(num_pairs)]}
    Dataset.from_dict(columns).to_parquet(str(folder / "train.parquet"))
    return folder


def measure_command(words, cwd):
    """Seconds, and the largest resident set in GB of the processes so far."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], cwd=cwd, check=True, capture_output=True)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def measure_loader(root, create_batches, words, num_pairs):
    """Milliseconds per pair."""
    create_batches = create_batches.format(num_epochs=NUM_EPOCHS)
    code = LOADER.format(root=str(root), create_batches=create_batches, first=num_pairs // BATCH_SIZE)
    command = [sys.executable, "-c", code, *map(str, words)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return 1000 * float(result.stdout.split()[-1])


def write_sdxl_data(folder, num_pairs=256):
    """Writes random data of SDXL's size at 1024², in half precision, as encode_preferences does."""
    latents = torch.randn(2, 2, 4, 128, 128).half()
    tensors = safetensors.torch.save({"latents": latents, "time_ids": torch.ones(2, 2, 6)})
    prompt = {"prompt_embeds": torch.randn(77, 2048).half(), "pooled_prompt_embeds": torch.randn(1280).half()}
    prompt = safetensors.torch.save(prompt)
    for part in ("pairs", "prompts"):
        (folder / part).mkdir(parents=True)
    pairs = [
        {"row": row, "label": 1.0, "caption": str(row), "prompt": row, "tensors": tensors} for row in range(num_pairs)
    ]
    prompts = [{"caption": str(row), "tensors": prompt} for row in range(num_pairs)]
    encode_preferences.write_shard(folder / "pairs/0.arrow", encode_preferences.PAIRS, pairs)
    encode_preferences.write_shard(folder / "prompts/0.arrow", encode_preferences.PROMPTS, prompts)


def measure_sdxl_loader(folder, num_workers):
    """Milliseconds per pair."""
    write_sdxl_data(folder)
    words = ["--pretrained_model_name_or_path", "random", "--encoded_data_dir", str(folder), "--seed", "0"]
    words += ["--train_batch_size", str(BATCH_SIZE), "--dataloader_num_workers", str(num_workers)]
    args = train_ncp_dpo_sdxl.parse_args(words)
    names = (*preference_pairs.ENCODING_ARGUMENTS, *preference_pairs.ENCODING_HINTS, "no_hflip")
    encoding = {**{name: getattr(args, name, 0.13) for name in names}, "num_pairs_shards": 1, "num_prompts_shards": 1}
    encoding["dataset_name"] = "random"
    (folder / "encoding.json").write_text(json.dumps(encoding))
    pairs = preference_pairs.EncodedPairs(args, {"scaling_factor": 0.13}, (4, 128, 128), torch.arange(1000), False)
    num_pairs = len(pairs.rows)
    batches = preference_pairs.create_dataloader(args, pairs, 0, (NUM_EPOCHS + 1) * num_pairs)
    for index, _ in enumerate(batches):
        if index == num_pairs // BATCH_SIZE:
            start = time.perf_counter()
    return 1000 * (time.perf_counter() - start) / (NUM_EPOCHS * num_pairs)


def main(num_pairs):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        before = folder / "before"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(before), BEFORE], cwd=ROOT, check=True, capture_output=True
        )
        try:
            measure(folder, before, num_pairs)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)


def measure(folder, before, num_pairs):
    seconds, memory, loader = {}, {}, {}
    # The newer version comes first, since `ru_maxrss` is the largest of all children.
    for name, root in [("tools/encode_preferences.py", ROOT), ("--cache_latents", before)]:
        for count in (num_pairs, 2 * num_pairs):
            data = folder / f"pairs-{count}"
            if not data.exists():
                data.mkdir()
                write_pairs(data, count)
            common = ["--pretrained_model_name_or_path", MODEL, "--resolution", 96, "--cache_dir", folder / "cache"]
            train = [*common, "--train_batch_size", BATCH_SIZE, "--seed", 0, "--max_train_steps", 1]
            if root == ROOT:
                output = folder / f"encoded-{count}"
                words = ["tools/encode_preferences.py", *common, "--dataset_name", data, "--output_dir", output]
                train += ["--encoded_data_dir", output]
            else:
                output = folder / f"output-{count}"
                words = ["train_ncp_dpo_sd15.py", *train, "--dataset_name", data, "--cache_latents"]
                words += ["--loss_space", "latent", "--output_dir", output]
                train += ["--dataset_name", data, "--cache_latents"]
            seconds[name, count], memory[name] = measure_command(words, root)
        for workers in (0, 2):
            create_batches = BATCHES_NOW if root == ROOT else BATCHES_BEFORE
            words = [*train, "--dataloader_num_workers", workers]
            loader[name, workers] = measure_loader(root, create_batches, words, 2 * num_pairs)

    print("| | pairs per second | largest resident set, GB | ms per pair in the loader, 0 workers | 2 workers |")
    print("|---|---|---|---|---|")
    for name in memory:
        rate = num_pairs / (seconds[name, 2 * num_pairs] - seconds[name, num_pairs])
        print(f"| `{name}` | {rate:.1f} | {memory[name]:.2f} | {loader[name, 0]:.2f} | {loader[name, 2]:.2f} |")
    times = [measure_sdxl_loader(folder / f"sdxl-{workers}", workers) for workers in (0, 2)]
    print(f"| encoded data of SDXL's size | | | {times[0]:.2f} | {times[1]:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pairs", type=preference_pairs.COUNT, default=400, help="Default: 400.")
    main(parser.parse_args().num_pairs)
