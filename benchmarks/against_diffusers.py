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

"""Steps per second beside diffusers' own `train_diffusion_dpo.py`, on the same model, pairs, batch and machine.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python benchmarks/against_diffusers.py --diffusers diffusers --json benchmarks/results/against_diffusers.json

trains a small Stable Diffusion in fp32 and in bf16 (half an hour on a CPU; the tables go to standard output). Each script runs
as it is, in a process of its own with one thread, and all of them take turns of some steps, so that whatever else the machine
does falls on all alike. A step is all that lies between the ends of two optimizer steps: loading, encoding, U-Net, logging. A
turn's first step, which may find its batch ready, does not count. Ratios are also given per second of the processor, which other
programs disturb less, but which counts what runs beside a step. Start-up, to the end of the first step, is apart. Where
torchvision or wandb are missing, what the script takes of them is replaced by the few lines of PIL and torch that it comes to.

The model has random weights and an eighth of SD 1.5's channels. A forward pass of its U-Net for one image is 0.79 GFLOP (F). Its
VAE's encoder costs 1.37 F and the U-Net's encoder 0.33 F. SD 1.5's cost 1.39 F and 0.33 F.
"""

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType


for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from datasets import Dataset  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "small_world")]

from base import ASSETS  # noqa: E402
from experiment import encode_png, to_pil  # noqa: E402
from scenes import SCENES, render  # noqa: E402

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402


THEIRS = "diffusers, latent DPO from images"
OURS = ROOT / "train_ncp_dpo_sd15.py"
# By precision and name: the flags that ours take beside the common ones, and the ratio aimed at.
METHODS = {
    precision: {
        "latent DPO from images": (["--loss_space", "latent"], aims[0]),
        "latent DPO, encoded data": (["--loss_space", "latent"], aims[1]),
        "NCP-DPO, encoded data": (["--loss_space", "ncp"], aims[2]),
    }
    for precision, aims in {"no": (1.2, 1.5, 1.1), "bf16": (None, 1.3, 1.0)}.items()
}
METHODS["no"] |= {f"{name}, --compile": ([*flags, "--compile"], aim) for name, (flags, aim) in METHODS["no"].items()}
RESOLUTION, BATCH_SIZE = 128, 4
NUM_PAIRS = 800
STEPS_PER_TURN = 10


def torchvision_transforms():
    """What `train_diffusion_dpo.py` takes of `torchvision.transforms`, for images of PIL."""

    def resize(size, interpolation):
        def apply(image):
            scale = size / min(image.size)
            return image.resize([int(side * scale) for side in image.size], interpolation)

        return apply

    def crop(size, choose):
        def apply(image):
            left, top = choose(image.width - size), choose(image.height - size)
            return image.crop((left, top, left + size, top + size))

        return apply

    def compose(functions):
        def apply(image):
            for function in functions:
                image = function(image)
            return image

        return apply

    def to_tensor(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    module = ModuleType("torchvision.transforms")
    module.InterpolationMode = Image.Resampling
    module.Resize, module.Compose, module.Lambda = resize, compose, lambda function: function
    module.CenterCrop = lambda size: crop(size, lambda rest: rest // 2)
    module.RandomCrop = lambda size: crop(size, lambda rest: random.randint(0, rest))
    module.RandomHorizontalFlip = lambda: lambda image: ImageOps.mirror(image) if random.random() < 0.5 else image
    module.ToTensor = lambda: to_tensor
    module.Normalize = lambda mean, std: lambda x: x.sub_(mean[0]).div_(std[0])
    return module


def load_script(path):
    """A script as a module, with stand-ins for what it imports and is not installed."""
    stand_ins = {}
    if importlib.util.find_spec("torchvision") is None:
        stand_ins["torchvision"] = ModuleType("torchvision")
        stand_ins["torchvision"].transforms = stand_ins["torchvision.transforms"] = torchvision_transforms()
    if importlib.util.find_spec("wandb") is None:
        stand_ins["wandb"] = ModuleType("wandb")
    for name, module in stand_ins.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules |= stand_ins
    spec.loader.exec_module(script)
    # Other libraries look for the real ones.
    for name in stand_ins:
        del sys.modules[name]
    return script


def train(turns, path, words, log):
    """
    Runs a training script in turns. After each it sends the seconds of its steps but the first, by the clock and of the
    processor, and waits to hear whether to go on.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    step, ends = AcceleratedOptimizer.step, []

    def step_in_turn(optimizer, closure=None):
        step(optimizer, closure)
        ends.append((time.perf_counter(), time.process_time()))
        if len(ends) == 1 + STEPS_PER_TURN:
            turns.send([last - first for first, last in zip(ends[0], ends[-1])])
            if not turns.recv():
                sys.exit()
            ends.clear()

    AcceleratedOptimizer.step = step_in_turn
    script = load_script(path)
    script.main(script.parse_args(words))


class Training:
    """A script that trains in a process of its own while it has its turn; `startup_seconds` are to its first step's end."""

    def __init__(self, path, words, log):
        context, self.log = multiprocessing.get_context("spawn"), log
        self.turns, theirs = context.Pipe()
        self.process = context.Process(target=train, args=(theirs, path, words, log), daemon=True)
        start = time.perf_counter()
        self.process.start()
        theirs.close()
        warm_up, _ = self.receive()
        self.startup_seconds = time.perf_counter() - start - warm_up

    def receive(self):
        try:
            return self.turns.recv()
        except EOFError:
            sys.exit(f"{self.log.read_text(errors='replace')}\n{self.log.stem} has ended.")

    def end(self):
        self.turns.send(False)
        self.process.join()

    def take_turn(self):
        """Steps per second, by the clock and of the processor."""
        self.turns.send(True)
        return [STEPS_PER_TURN / seconds for seconds in self.receive()]


def make_model(folder):
    """Writes the model. Its tokenizer and its text encoder are the small world's."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(40, 80, 160, 160),
        cross_attention_dim=96,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    StableDiffusionPipeline.from_pretrained(ASSETS, vae=vae, unet=unet).save_pretrained(folder / "model")


def write_data(folder):
    """Pairs of the small world's pictures, enlarged, and what `encode_preferences.py` makes of them."""
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    scenes = [rng.choice(SCENES) for _ in range(NUM_PAIRS)]
    columns = {}
    for column in ("jpg_0", "jpg_1"):
        images = (image.resize((RESOLUTION, RESOLUTION)) for image in to_pil(render(scenes, generator)))
        columns[column] = list(map(encode_png, images))
    columns |= {"label_0": [rng.randint(0, 1) for _ in scenes], "caption": [scene.caption for scene in scenes]}
    (folder / "pairs").mkdir()
    Dataset.from_dict(columns).to_parquet(str(folder / "pairs" / "train.parquet"))
    words = [*common_words(folder), "--dataset_name", folder / "pairs", "--image_interpolation_mode", "bilinear"]
    command = [sys.executable, ROOT / "tools" / "encode_preferences.py", *words, "--output_dir", folder / "encoded"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def common_words(folder):
    model = ["--pretrained_model_name_or_path", folder / "model"]
    return [*model, "--resolution", RESOLUTION, "--cache_dir", folder / "cache"]


def start_trainings(folder, diffusers, precision):
    """All of a precision, one after the other, by their names."""
    path = diffusers / "examples" / "research_projects" / "diffusion_dpo" / "train_diffusion_dpo.py"
    if not path.is_file():
        sys.exit(f"--diffusers {diffusers} has no {path.relative_to(diffusers)}.")
    common = [*common_words(folder), "--train_batch_size", BATCH_SIZE, "--learning_rate", 1e-4, "--seed", 0]
    common += ["--mixed_precision", precision]
    # Without end, and without a checkpoint's time.
    common += ["--max_train_steps", 10**6, "--checkpointing_steps", 10**6]
    images = ["--dataset_name", folder / "pairs", "--dataset_split_name", "train"]
    words = {THEIRS: (path, [*common, *images])}
    for name, (flags, _) in METHODS[precision].items():
        data = images if "images" in name else ["--encoded_data_dir", folder / "encoded"]
        words[name] = (OURS, [*common, *flags, *data, "--image_interpolation_mode", "bilinear"])
    trainings = {}
    for name, (path, flags) in tqdm(words.items(), "Start-up"):
        flags = [str(word) for word in [*flags, "--output_dir", folder / precision / name]]
        trainings[name] = Training(path, flags, folder / f"{name}, {precision}.log")
    return trainings


def measure(trainings, num_turns):
    """Steps per second by name and turn; every other round goes the other way."""
    rates = {name: [] for name in trainings}
    for index in tqdm(range(num_turns), "Turns"):
        for name in list(trainings)[:: 1 if index % 2 == 0 else -1]:
            rates[name].append(trainings[name].take_turn())
    return rates


def summarize(rates, trainings, precision):
    """For each: its steps per second, their ratio to theirs in the same round, and its start-up; quartiles over rounds."""
    results = {}
    for name, values in rates.items():
        ratios, processor_ratios = (
            statistics.quantiles(
                [ours[i] / theirs[i] for ours, theirs in zip(values, rates[THEIRS])], method="inclusive"
            )
            for i in (0, 1)
        )
        results[name] = {
            "steps_per_second": statistics.median(rate for rate, _ in values),
            "ratio_quartiles": ratios,
            "processor_ratio_quartiles": processor_ratios,
            "target": METHODS[precision].get(name, (None, None))[1],
            "startup_seconds": trainings[name].startup_seconds,
        }
    return results


def table(results):
    header = [
        "",
        "steps per second",
        "× diffusers' (quartiles)",
        "aim",
        "per second of processor",
        "s to the first step",
    ]
    lines = [header, ["---"] * len(header)]
    for name, result in results.items():
        ratios = [
            f"{median:.2f} ({low:.2f} – {high:.2f})"
            for low, median, high in (result["ratio_quartiles"], result["processor_ratio_quartiles"])
        ]
        numbers = [f"{result['steps_per_second']:.2f}", ratios[0], result["target"] or "", ratios[1]]
        lines.append([name, *map(str, numbers), f"{result['startup_seconds']:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        folder, results = Path(folder), {}
        make_model(folder)
        write_data(folder)
        for precision in METHODS:
            trainings = start_trainings(folder, args.diffusers, precision)
            results[precision] = summarize(measure(trainings, args.turns), trainings, precision)
            for training in trainings.values():
                training.end()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "accelerate", "peft")}
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, 1 thread each"
    )
    print(f"{device}; {', '.join(f'{name} {version}' for name, version in versions.items())}; ", end="")
    print(f"{args.turns} turns of {STEPS_PER_TURN} steps each, batch {BATCH_SIZE}")
    for precision, rows in results.items():
        print(f"\n--mixed_precision {precision}\n\n{table(rows)}")
    if args.json is not None:
        report = {"device": device, "versions": versions, "turns": args.turns, "steps_per_turn": STEPS_PER_TURN}
        args.json.write_text(json.dumps({**report, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--turns", type=int, default=20, help="turns of each script")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    main(parser.parse_args())
