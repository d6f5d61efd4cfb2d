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


"""Trains on preferences in a small world whose true reward is known, and measures the result.

    python small_world/experiment.py pairs          # draws pictures with the base, labels and encodes pairs of them
    python small_world/experiment.py run dpo-ncp    # one row of the table: its settings and its trainings
    python small_world/experiment.py all            # all rows, two at a time, and the report

    # a row with another base, which `base.py` has written to small-world-strong/base
    python small_world/experiment.py run dpo-ncp --folder small-world-strong --output_dir small_world/results_strong

`scenes.py` defines what pictures show and how good they are. `base.py` trains the model that draws them. The better picture
of a pair usually wins, but not always, as with people (Bradley-Terry). `tools/encode_preferences.py` encodes the pairs once.
`train_ncp_dpo_sd15.py` trains on them in this process. The true reward then measures pictures of other captions.

`protocol.py` lists the rows and says how their settings are chosen. Every run is a line of `runs.jsonl` in the results; a run
that is there is not run again.
"""

import argparse
import copy
import functools
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import quantiles

import protocol
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from base import ASSETS, encode
from datasets import Dataset
from judges import TEMPERATURE
from protocol import ROOT, SEED, split_scenes
from scenes import RESOLUTION, Explanations, render, reward
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm.auto import tqdm

from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline


sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import encode_preferences  # noqa: E402
import prepare_preferences  # noqa: E402
import train_ncp_dpo_sd15 as trainer  # noqa: E402


PICTURES_PER_SCENE = 6
GUIDANCE_SCALE = 2.0
NUM_INFERENCE_STEPS = 20
# Measured pictures, and all pictures of the demo, are drawn by a solver that needs fewer steps.
MEASURED_INFERENCE_STEPS = 8
WORLD_NAME = "world.sha256"
# The first seeds of the noise that pictures are drawn from.
PAIRS_NOISE, CHOOSING_NOISE, TEST_NOISE = 10_000, 30_000, 40_000
# The options of `tools/encode_preferences.py`. Trainings in bf16 read the same tensors as those in fp32.
ENCODING = {"resolution": RESOLUTION, "no_hflip": None, "mixed_precision": "no"}


# Preferences


def base_of(folder):
    """Returns the base model of what is in `folder`: `folder / "base"` if it exists, otherwise the committed one."""
    return folder / "base" if (folder / "base").is_dir() else ASSETS


def load_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, scenes, first_seed, num_inference_steps=None):
    """Draws pictures `(N, 3, H, W)` in [0, 1]. Picture i starts from the noise of seed `first_seed + i`."""
    pictures = []
    for start in tqdm(range(0, len(scenes), 40), desc="Drawing", leave=False):
        batch = scenes[start : start + 40]
        generators = [torch.Generator().manual_seed(first_seed + start + index) for index in range(len(batch))]
        pictures.append(
            pipeline(
                [scene.caption for scene in batch],
                height=RESOLUTION,
                width=RESOLUTION,
                num_inference_steps=num_inference_steps or NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generators,
                output_type="pt",
            ).images
        )
    return torch.cat(pictures).float()


def to_pil(pictures):
    return StableDiffusionPipeline.numpy_to_pil(pictures.permute(0, 2, 3, 1).numpy())


def encode_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def compare(scenes, pictures, rewards, rng, temperature=TEMPERATURE):
    """Returns all pairs of each scene's pictures. The better picture wins with probability σ(difference / temperature)."""
    rows = []
    for first in range(0, len(scenes), PICTURES_PER_SCENE):
        for i, j in itertools.combinations(range(first, first + PICTURES_PER_SCENE), 2):
            probability = torch.sigmoid((rewards[i] - rewards[j]) / temperature).item()
            rows.append(
                {
                    "caption": scenes[i].caption,
                    "jpg_0": pictures[i],
                    "jpg_1": pictures[j],
                    "label_0": float(rng.random() < probability),
                    "image_0_uid": str(i),
                    "image_1_uid": str(j),
                    "ranking_id": len(rows),
                }
            )
    return rows


def write_pairs(pipeline, explanations, scenes, first_seed, folder, num_inference_steps=None):
    """
    Draws `PICTURES_PER_SCENE` pictures of each scene, compares them, and writes the pairs as a dataset for training. Its file
    gets its final name only when it is complete.

    Returns:
        `Reward` of the pictures.
    """
    scenes = [scene for scene in scenes for _ in range(PICTURES_PER_SCENE)]
    pictures = draw(pipeline, scenes, first_seed, num_inference_steps)
    rewards = reward(pictures, scenes, explanations)
    rows = compare(scenes, [encode_png(image) for image in to_pil(pictures)], rewards.total, random.Random(SEED))
    folder.mkdir(parents=True, exist_ok=True)
    incomplete = folder / "incomplete"
    Dataset.from_list(rows).to_parquet(str(incomplete))
    incomplete.rename(folder / "train.parquet")
    return rewards


def make_training_pairs(pipeline, explanations, folder, num_inference_steps=None):
    """Writes all pairs, and a second dataset of those that an absolute winner won. Returns `Reward` of the pictures."""
    training, _, _ = split_scenes()
    rewards = write_pairs(pipeline, explanations, training, PAIRS_NOISE, folder / "pairs", num_inference_steps)
    pairs, kept = {"dataset_name": folder / "pairs"}, folder / "kept.parquet"
    kept.unlink(missing_ok=True)
    shutil.rmtree(folder / "filtered", ignore_errors=True)
    run_script(prepare_preferences, {**pairs, "output_file": kept}, "filter")
    run_script(prepare_preferences, {"rows_file": kept, **pairs, "output_dir": folder / "filtered"}, "convert", "rows")
    return rewards


def label_anew(folder, name, rewards):
    """Writes the same pairs to `folder / name`, labelled by other rewards of their pictures."""
    rng = random.Random(SEED)

    def label(row):
        first, second = (rewards[int(row[f"image_{side}_uid"])].item() for side in (0, 1))
        return {**row, "label_0": float(rng.random() < 1 / (1 + math.exp((second - first) / TEMPERATURE)))}

    (folder / name).mkdir()
    pairs = Dataset.from_parquet(str(folder / "pairs" / "train.parquet"), cache_dir=str(folder / "cache"))
    Dataset.from_list(list(map(label, pairs))).to_parquet(str(folder / name / "train.parquet"))


def encode_pairs(folder, name):
    """Encodes the pairs in `folder / name` for training, into `folder / f"encoded-{name}"`."""
    # An earlier call may have encoded other pairs.
    shutil.rmtree(folder / f"encoded-{name}", ignore_errors=True)
    options = {
        "pretrained_model_name_or_path": base_of(folder),
        "dataset_name": folder / name,
        **ENCODING,
        "output_dir": folder / f"encoded-{name}",
    }
    run_script(encode_preferences, options)


def digest_of_world(folder):
    """Returns a digest of what pairs and results depend on: the base, drawing, the reward, labels and encoding."""
    files = [*sorted(base_of(folder).rglob("*.safetensors")), Path(__file__).with_name("scenes.py")]
    drawing = (SEED, protocol.NUM_TRAINING_SCENES, PICTURES_PER_SCENE, GUIDANCE_SCALE, NUM_INFERENCE_STEPS)
    contents = [file.read_bytes() for file in files] + [repr((*drawing, TEMPERATURE, ENCODING)).encode()]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def check_world(folder, name=WORLD_NAME):
    """Raises a `ValueError` if the pairs in `folder` were made in another world than the one whose digest is in its file `name`."""
    if (folder / name).read_text() != digest_of_world(folder):
        raise ValueError(
            f"--folder {folder} holds pairs of another base model, reward or encoding. Give another folder, or remove it."
        )


def make_pairs(folder):
    """Writes all pairs to train on, and encodes them."""
    if (folder / "runs").exists():
        raise ValueError(f"--folder {folder} holds runs on its pairs. Give another folder, or remove it.")
    rewards = make_training_pairs(load_pipeline(base_of(folder)), Explanations(), folder)
    label_anew(folder, "match", rewards.match)
    label_anew(folder, "drawing", (rewards.quality + rewards.style) / 2)
    for name in ("pairs", "filtered", "match", "drawing"):
        encode_pairs(folder, name)
    (folder / WORLD_NAME).write_text(digest_of_world(folder))


def open_world(folder):
    """Makes pairs unless they are there, and checks that they are of this world."""
    if not (folder / WORLD_NAME).is_file():
        make_pairs(folder)
    check_world(folder)


# Training


def script_words(options):
    """Returns the words of a command line for a script's options. An option whose value is `None` is a flag."""
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    return words


def run_script(module, options, *words):
    """Runs one of this repository's scripts in this process, and then restores the signal handlers."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if module.main(module.parse_args([*words, *script_words(options)])):
        raise RuntimeError(f"{Path(module.__file__).name} has failed, see above.")
    for each, handler in handlers.items():
        signal.signal(each, handler)


def training_options(folder, output_dir, method, learning_rate, beta, seed, steps):
    """Returns the trainer's options, with checkpoints at all `steps`."""
    options = {
        "pretrained_model_name_or_path": base_of(folder),
        "encoded_data_dir": "encoded-pairs",
        "resolution": RESOLUTION,
        "no_hflip": None,
        "rank": 16,
        "train_batch_size": 8,
        "loss_type": "dpo",
        **({} if beta is None else {"beta_dpo": f"{beta:g}"}),
        "learning_rate": learning_rate,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 20,
        "max_train_steps": steps[-1],
        "checkpointing_steps": math.gcd(*steps),
        "seed": seed,
        "output_dir": output_dir,
        "resume_from_checkpoint": "latest",
        **protocol.METHODS[method],
    }
    options["encoded_data_dir"] = folder / options["encoded_data_dir"]
    return options


def training_command(options):
    """Returns the command that a user would run in the repository's root."""
    relative = {
        name: os.path.relpath(value, ROOT) if isinstance(value, Path) else value for name, value in options.items()
    }
    return shlex.join(["python", Path(trainer.__file__).name, *script_words(relative)])


def train(options):
    """Runs the trainer with `options`. Returns what it logged."""
    run_script(trainer, options)
    (logs,) = (path for path in (Path(options["output_dir"]) / "logs").iterdir() if path.is_dir())
    return EventAccumulator(str(logs)).Reload()


# Measuring


@functools.cache
def load_measuring(base):
    """Returns a pipeline that draws measured pictures with a base, and the `Explanations` that their reward needs."""
    pipeline = load_pipeline(base)
    options = {"timestep_spacing": "trailing"}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **options)
    return pipeline, Explanations()


def test_noise(seed):
    """Returns the first seed of the noise for the results of trainings with `seed`, which is the same for all methods."""
    return TEST_NOISE + 1_000 * seed


def measured_scenes(name):
    return dict(zip(("choosing", "test"), split_scenes()[1:]))[name]


def summarize(rewards):
    """Returns the mean of each part of the reward, and the total of every picture, rounded."""
    parts = {name: round(values.mean().item(), 4) for name, values in rewards._asdict().items()}
    return {**parts, "total": [round(value, 4) for value in rewards.total.tolist()]}


def draw_and_reward(base, name, seed, lora=None, repeats=None):
    """
    Draws the captions that choose settings (`"choosing"`) or give the results (`"test"`), and returns their `Reward`. All
    captions are drawn once, then all once more, and so on, so that the first pictures do not depend on `repeats`.
    """
    pipeline, explanations = load_measuring(base)
    noise = {"choosing": CHOOSING_NOISE, "test": test_noise(seed)}[name]
    scenes = measured_scenes(name) * (repeats or protocol.PICTURES_PER_CAPTION)
    unet, pipeline.unet = pipeline.unet, copy.deepcopy(pipeline.unet)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name=trainer.WEIGHTS_NAME)
        pipeline.fuse_lora()
    pictures = draw(pipeline, scenes, noise, MEASURED_INFERENCE_STEPS)
    pipeline.unet = unet
    return reward(pictures, scenes, explanations)


def measure(*args, **options):
    """Returns what `summarize` gives for the pictures of `draw_and_reward`."""
    return summarize(draw_and_reward(*args, **options))


@torch.no_grad()
def measure_best(base):
    """Measures well-drawn, outlined pictures that the base's VAE has encoded and decoded. No policy can draw better ones."""
    pipeline, explanations = load_measuring(base)
    scenes = split_scenes()[2] * 4
    pictures = render(scenes, torch.Generator().manual_seed(SEED), well_drawn=1.0)
    outlined = reward(pictures, scenes, explanations).style > 0.5
    scenes, pictures = [scene for scene, has in zip(scenes, outlined) if has], pictures[outlined]
    decoded = pipeline.vae.decode(encode(pipeline.vae, 2 * pictures - 1)).sample
    return summarize(reward((decoded / 2 + 0.5).clamp(0, 1), scenes, explanations))


def measure_references(folder, runs_file):
    """Measures the best possible pictures, and the base's pictures from the noise of each seed."""
    base, runs = base_of(folder), protocol.load_runs(runs_file)
    repeats = protocol.TEST_PICTURES_PER_CAPTION
    for name, measure_reference in (
        ("best", lambda: measure_best(base)),
        ("base-choosing", lambda: measure(base, "choosing", SEED)),
        *(
            (protocol.base_name(seed), functools.partial(measure, base, "test", seed, repeats=repeats))
            for seed in range(max(protocol.NUM_SEEDS.values()))
        ),
    ):
        if name not in runs:
            protocol.append_run(runs_file, {"name": name, **measure_reference()})


# The experiment


def run_name(method, learning_rate, beta, seed):
    return f"{method}-{learning_rate:g}-{seed}" if beta is None else f"{method}-{learning_rate:g}-{beta:g}-{seed}"


def run(folder, runs_file, method, learning_rate, beta, seed, steps, best_step=None):
    """
    Makes one run and returns it. The first seed is measured after all `steps` on the captions that choose settings. If
    `best_step` is given, the run is also measured after all `steps` on the captions of the results, with more pictures
    after `best_step`. What `runs_file` holds is not measured again.
    """
    name = run_name(method, learning_rate, beta, seed)
    output_dir = folder / "runs" / name
    new = {"name": name, "method": method, "learning_rate": learning_rate, "beta": beta, "seed": seed}
    result = protocol.load_runs(runs_file).get(name, new)
    # A run that was trained for longer keeps its steps.
    steps = tuple(sorted({*steps, *map(int, result.get("choosing") or result.get("test") or ())}))
    options = training_options(folder, output_dir, method, learning_rate, beta, seed, steps)
    command = training_command(options)
    if len({re.sub(r" --max_train_steps \d+", "", text) for text in (command, result.get("command", command))}) > 1:
        raise ValueError(
            f"{runs_file} holds the run {name} of another command: {result['command']}. Remove its line, or give another "
            "--folder or --output_dir."
        )
    repeats = {}
    if seed == SEED:
        repeats["choosing"] = dict.fromkeys(steps, protocol.PICTURES_PER_CAPTION)
    if best_step is not None:
        repeats["test"] = dict.fromkeys(steps, protocol.PICTURES_PER_CAPTION)
        repeats["test"][best_step] = protocol.TEST_PICTURES_PER_CAPTION
    missing = [
        (captions, step, number)
        for captions, numbers in sorted(repeats.items())
        for step, number in numbers.items()
        if len(result.get(captions, {}).get(str(step), {"total": []})["total"])
        < number * len(measured_scenes(captions))
    ]
    if missing:
        times = []
        hook = register_optimizer_step_post_hook(lambda *_: times.append(time.process_time()))
        train(options)
        hook.remove()
        if len(times) > 2:
            # The 10th percentile: other work on the machine and checkpoints slow down most other steps.
            seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
            result["seconds_per_step"] = round(quantiles(seconds, n=10)[0], 4)
        for captions, step, number in missing:
            measured = measure(base_of(folder), captions, seed, output_dir / f"checkpoint-{step}", number)
            result[captions] = {**result.get(captions, {}), str(step): measured}
        result["command"] = command
        protocol.append_run(runs_file, result)
    return result


def choose_settings(folder, runs_file, method):
    """Returns what `protocol.choose` gives, and makes the runs that it needs."""

    def load(rate, beta, steps):
        return run(folder, runs_file, method, rate, beta, SEED, steps)

    return protocol.choose(method, load)


def run_row(folder, runs_file, method, num_seeds):
    """Chooses a method's settings, and trains and tests with each seed."""
    rate, beta, steps, best_step = choose_settings(folder, runs_file, method)
    for seed in range(num_seeds):
        run(folder, runs_file, method, rate, beta, seed, steps, best_step)


def create_workers(num_workers):
    """Returns an executor of `num_workers` processes of one core each."""
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def run_all(folder, runs_file, num_workers):
    """Makes all rows in `num_workers` processes of one core each. All rows get three seeds before any row gets more."""
    methods, failed = protocol.METHODS, {}
    with (
        create_workers(num_workers) as executor,
        tqdm(total=2 * len(methods), desc="Rows") as progress_bar,
    ):
        for at_most in (3, 5):
            rows = {
                method: executor.submit(run_row, folder, runs_file, method, min(at_most, protocol.NUM_SEEDS[method]))
                for method in methods
            }
            for method, row in rows.items():
                if row.exception() is not None:
                    failed[method] = row.exception()
                progress_bar.update()
    if failed:
        raise RuntimeError(f"Rows failed: {failed}. Run `all` again to make what is missing.")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="draw with the base, label and encode")
    everything = commands.add_parser("all", help="the whole experiment")
    everything.add_argument("--num_workers", type=int, default=2, help="rows at a time, one core each")
    some = commands.add_parser("run", help="train and measure some methods")
    methods = list(protocol.METHODS)
    some.add_argument("methods", metavar="METHOD", choices=methods, nargs="+", help=", ".join(methods))
    for command in (pairs, everything, some):
        command.add_argument("--folder", type=Path, default=Path("small-world"), help="folder of pairs and LoRAs")
    for command in (everything, some):
        command.add_argument("--output_dir", type=Path, default=protocol.RESULTS, help="folder of results")
    return parser.parse_args(input_args)


def main(args):
    if args.command == "pairs":
        make_pairs(args.folder)
        return
    open_world(args.folder)
    runs_file = args.output_dir / protocol.RUNS_NAME
    measure_references(args.folder, runs_file)
    if args.command == "all":
        run_all(args.folder, runs_file, args.num_workers)
    else:
        torch.set_num_threads(1)
        for method in args.methods:
            run_row(args.folder, runs_file, method, protocol.NUM_SEEDS[method])
    report = [str(Path(__file__).with_name("report.py")), "--output_dir", str(args.output_dir)]
    subprocess.run([sys.executable, *report], check=True)


if __name__ == "__main__":
    main(parse_args())
