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

"""What preference training makes of a small world in which the truth is known.

    python small_world/experiment.py pairs          # what the base draws, labelled by a hidden preference, and encoded
    python small_world/experiment.py run dpo-ncp    # a row of the table: its learning rate, its beta, its trainings
    python small_world/experiment.py all            # all rows, two at a time, and the report

    # the same with another base, which `base.py` has written to small-world-strong/base
    python small_world/experiment.py run dpo-ncp --folder small-world-strong --output_dir small_world/results_strong

What pictures show and how good they are is in `scenes.py`; `base.py` trains the model that draws them. Pairs are labelled
as people do it, the better picture winning only more often (Bradley-Terry), encoded once by `tools/encode_preferences.py`
and trained on by `train_ncp_dpo_sd15.py`, in this process. How good pictures of other captions then are is known exactly.

A row's learning rate and beta are chosen with the first seed: doubled or halved in turn as long as that draws a set of
captions of its own better at its best checkpoint. With these it is trained on as long as its last checkpoint is its best.
Every run's numbers are a file in `results/runs`; what is there is not run again.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
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
from statistics import fmean, quantiles

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from base import ASSETS, encode
from datasets import Dataset
from scenes import RESOLUTION, SCENES, Explanations, render, reward
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm.auto import tqdm

from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import encode_preferences  # noqa: E402
import prepare_preferences  # noqa: E402
import train_ncp_dpo_sd15 as trainer  # noqa: E402


SEED = 0
# Prompts to train on; the others are halved into those that choose settings and those that the results are from.
NUM_TRAINING_SCENES = 160
PICTURES_PER_SCENE = 6
TEMPERATURE = 0.05  # of the choice: a difference in reward of 0.05 decides 73 % of the time
GUIDANCE_SCALE = 2.0
NUM_INFERENCE_STEPS = 20
# What is measured is drawn by a solver that needs fewer steps.
MEASURED_INFERENCE_STEPS = 8
# Of every caption: at all steps, and at the one that was chosen
PICTURES_PER_CAPTION, TEST_PICTURES_PER_CAPTION = 2, 8
NUM_INVERSION_STEPS = 5
WORLD_NAME = "world.sha256"
# The first seed of the noise that pictures are drawn from
PAIRS_NOISE, CHOOSING_NOISE, TEST_NOISE = 10_000, 30_000, 40_000
# Training in bf16 reads the same tensors.
ENCODING = {"resolution": RESOLUTION, "no_hflip": None, "mixed_precision": "no"}
RESULTS = Path(__file__).with_name("results")
# Steps after which pictures are measured; if the last is the best, more follow, as far apart as the first is from 0.
STEPS, MAX_STEPS = (75, 150, 225), 450
# Filtered pairs are fewer, and learnt sooner.
FILTERED_STEPS = (25, 50, 75, 100, 125, 150)
# What is tried first, and by what learning rate and beta are then changed
LEARNING_RATE, FACTORS = 5e-4, (2, 1 / 2)
# The likelihood's sum over elements is a mean in the loss: 5000 for SD 1.5's 16,384 elements are 176 for 576. Others for
# losses whose beta is not that of a likelihood.
BETA_DPO, BETAS = 200, {"mapo": 0.1, "linear": 4, "sft": None}
LATENT, BALANCED, LATE = {"loss_space": "latent"}, {"timestep_weighting": "balanced"}, {"min_timestep": 400}
TYPICAL_SCALE = 1300  # of errors in feature space: what `auto` measures, about
FILTERED, BF16 = {"encoded_data_dir": "encoded-filtered"}, {"mixed_precision": "bf16"}
# What each row of the table adds to the command, the most important first
METHODS = {
    "dpo-latent": LATENT,
    "dpo-ncp": {},
    "dpo-latent-balanced": {**LATENT, **BALANCED},
    "dpo-ncp-balanced": BALANCED,
    "dpo-latent-profile": {**LATENT, "timestep_weighting": "ncp"},
    "dpo-ncp-down": {"ncp_layer": "down"},
    "cpo-latent": {"loss_type": "cpo", **LATENT},
    "cpo-ncp": {"loss_type": "cpo"},
    "sft-latent": {"loss_type": "sft", **LATENT},
    "sft-ncp": {"loss_type": "sft"},
    "dpo-latent-late": {**LATENT, **LATE},
    "dpo-ncp-late": LATE,
    "dpo-ncp-scale-1": {"ncp_error_scale": 1},
    "dpo-latent-filtered": {**LATENT, **FILTERED},
    "dpo-ncp-filtered": FILTERED,
    "dpo-latent-safeguard": {**LATENT, "sdpo_safeguard": None},
    "dpo-ncp-safeguard": {"sdpo_safeguard": None},
    **{
        f"{loss}-{space}": {"loss_type": loss, "loss_space": space}
        for loss in ("simpo", "mapo", "dmpo", "linear")
        for space in ("latent", "ncp")
    },
    "simpo-latent-filtered": {"loss_type": "simpo", **LATENT, **FILTERED},
    "simpo-ncp-filtered": {"loss_type": "simpo", **FILTERED},
    "dpo-sum": {"ncp_error_scale": TYPICAL_SCALE},
    "dpo-latent-inverted": LATENT,
    **{
        f"dpo-{space}-by-{part}": {"loss_space": space, "encoded_data_dir": f"encoded-{part}"}
        for part in ("match", "drawing")
        for space in ("latent", "ncp")
    },
    "dpo-ncp-bf16-literal": {**BF16, "ncp_probe_rms": 0},
    "dpo-ncp-bf16-probe": BF16,
}
NUM_SEEDS = {
    method: 5 if index < 4 or method.startswith(("cpo", "sft", "simpo")) or method.endswith("filtered") else 3
    for index, method in enumerate(METHODS)
}


# Preferences


def split_scenes():
    """Scenes to train on, to choose settings with, and to measure with."""
    scenes = random.Random(SEED).sample(SCENES, len(SCENES))
    middle = (NUM_TRAINING_SCENES + len(scenes)) // 2
    return scenes[:NUM_TRAINING_SCENES], scenes[NUM_TRAINING_SCENES:middle], scenes[middle:]


def base_of(folder):
    """The base model of the pairs and runs in `folder`: its own if it has one, otherwise the committed one."""
    return folder / "base" if (folder / "base").is_dir() else ASSETS


def load_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, scenes, first_seed, num_inference_steps=None):
    """Pictures `(N, 3, H, W)` in [0, 1], each from its own noise: `first_seed`, `first_seed + 1` and so on."""
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


def compare(scenes, pictures, rewards, rng):
    """All pairs of each scene's pictures, the better one the winner with probability σ(difference / TEMPERATURE)."""
    rows = []
    for first in range(0, len(scenes), PICTURES_PER_SCENE):
        for i, j in itertools.combinations(range(first, first + PICTURES_PER_SCENE), 2):
            probability = torch.sigmoid((rewards[i] - rewards[j]) / TEMPERATURE).item()
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


def write_pairs(pipeline, explanations, scenes, first_seed, folder):
    """
    Draws `PICTURES_PER_SCENE` pictures of each scene, compares them, and writes the pairs as a dataset for training, whole
    or not at all.

    Returns:
        `Reward` of the pictures.
    """
    scenes = [scene for scene in scenes for _ in range(PICTURES_PER_SCENE)]
    pictures = draw(pipeline, scenes, first_seed)
    rewards = reward(pictures, scenes, explanations)
    rows = compare(scenes, [encode_png(image) for image in to_pil(pictures)], rewards.total, random.Random(SEED))
    folder.mkdir(parents=True, exist_ok=True)
    incomplete = folder / "incomplete"
    Dataset.from_list(rows).to_parquet(str(incomplete))
    incomplete.rename(folder / "train.parquet")
    return rewards


def make_training_pairs(pipeline, explanations, folder):
    """Writes the pairs, and those of absolute winners alone. Returns `Reward` of the pictures."""
    training, _, _ = split_scenes()
    rewards = write_pairs(pipeline, explanations, training, PAIRS_NOISE, folder / "pairs")
    pairs, kept = {"dataset_name": folder / "pairs"}, folder / "kept.parquet"
    kept.unlink(missing_ok=True)
    shutil.rmtree(folder / "filtered", ignore_errors=True)
    run_script(prepare_preferences, {**pairs, "output_file": kept}, "filter")
    run_script(prepare_preferences, {"rows_file": kept, **pairs, "output_dir": folder / "filtered"}, "convert", "rows")
    return rewards


def label_anew(folder, name, rewards):
    """Writes the same pairs, the one of the higher of these rewards the winner more often, to `folder / name`."""
    rng = random.Random(SEED)

    def label(row):
        first, second = (rewards[int(row[f"image_{side}_uid"])].item() for side in (0, 1))
        return {**row, "label_0": float(rng.random() < 1 / (1 + math.exp((second - first) / TEMPERATURE)))}

    (folder / name).mkdir()
    pairs = Dataset.from_parquet(str(folder / "pairs" / "train.parquet"), cache_dir=str(folder / "cache"))
    Dataset.from_list(list(map(label, pairs))).to_parquet(str(folder / name / "train.parquet"))


def encode_pairs(folder, name):
    """Turns the pairs in `folder / name` into what training reads, in `folder / f"encoded-{name}"`."""
    # Those there may be of other pairs.
    shutil.rmtree(folder / f"encoded-{name}", ignore_errors=True)
    options = {
        "pretrained_model_name_or_path": base_of(folder),
        "dataset_name": folder / name,
        **ENCODING,
        "output_dir": folder / f"encoded-{name}",
    }
    run_script(encode_preferences, options)


def digest_of_world(folder):
    """Of what pairs and results depend on: the base model, how it draws, how its pictures are judged, and how encoded."""
    files = [*sorted(base_of(folder).rglob("*.safetensors")), Path(__file__).with_name("scenes.py")]
    drawing = (SEED, NUM_TRAINING_SCENES, PICTURES_PER_SCENE, GUIDANCE_SCALE, NUM_INFERENCE_STEPS)
    contents = [file.read_bytes() for file in files] + [repr((*drawing, TEMPERATURE, ENCODING)).encode()]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def check_world(folder):
    """A `ValueError` if the pairs in `folder`, and so the runs on them, are of another world."""
    if (folder / WORLD_NAME).read_text() != digest_of_world(folder):
        raise ValueError(
            f"--folder {folder} holds pairs of another base model, reward or encoding. Give another one, or remove it."
        )


def make_pairs(folder):
    """Writes the pairs to train on, encoded as well."""
    if (folder / "runs").exists():
        raise ValueError(f"--folder {folder} holds runs on its pairs. Give another one, or remove it.")
    rewards = make_training_pairs(load_pipeline(base_of(folder)), Explanations(), folder)
    label_anew(folder, "match", rewards.match)
    label_anew(folder, "drawing", (rewards.quality + rewards.style) / 2)
    for name in ("pairs", "filtered", "match", "drawing"):
        encode_pairs(folder, name)
    (folder / WORLD_NAME).write_text(digest_of_world(folder))


# Training


def script_words(options):
    """Options of one of this repository's scripts as words of its command line; those that are `None` are flags."""
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    return words


def run_script(module, options, *words):
    """Runs one of this repository's scripts in this process, which has no trace of it afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if module.main(module.parse_args([*words, *script_words(options)])):
        raise RuntimeError(f"{Path(module.__file__).name} has failed, see above.")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def training_options(folder, output_dir, method, learning_rate, beta, seed, steps):
    """Options of the trainer, with checkpoints at all `steps`."""
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
        **METHODS[method],
    }
    options["encoded_data_dir"] = folder / options["encoded_data_dir"]
    return options


def training_command(options):
    """What a user would run in the repository's root."""
    relative = {
        name: os.path.relpath(value, ROOT) if isinstance(value, Path) else value for name, value in options.items()
    }
    return shlex.join(["python", Path(trainer.__file__).name, *script_words(relative)])


def measure_sum(measure_errors, args, denoising, unet, policy, perception, *others, **options):
    """Of both errors, half and half, where the trainer measures one."""
    latent, both = (measure_errors(args, denoising, unet, policy, p, *others, **options) for p in (None, perception))
    means = (None if own is None else (other + own) / 2 for other, own in zip(latent, both))
    return trainer.Errors(*means)


@torch.no_grad()
def invert(noise_batch, args, batch, pipeline, noise_scheduler):
    """
    Noisy latents on the reference's own way to the picture, by DDIM inversion as in InPO (arXiv:2503.18454), instead of the
    picture under any noise.
    """
    denoising, x_t = noise_batch(args, batch, pipeline, noise_scheduler), batch["latents"].float()
    alphas_cumprod, seen, abar = noise_scheduler.alphas_cumprod.view(-1, 1, 1, 1), 0 * denoising.timesteps, 1.0
    for index in range(1, NUM_INVERSION_STEPS + 1):
        noise = denoising._replace(noisy_latents=x_t, timesteps=seen).predict_reference(pipeline.unet)
        x_0 = (x_t - (1 - abar) ** 0.5 * noise) / abar**0.5
        seen = denoising.timesteps * index // NUM_INVERSION_STEPS
        abar = alphas_cumprod[seen]
        x_t = abar**0.5 * x_0 + (1 - abar) ** 0.5 * noise
    # The noise that takes the picture there at once.
    target = (x_t - abar**0.5 * batch["latents"].float()) / (1 - abar) ** 0.5
    return denoising._replace(noisy_latents=x_t, target=target)


# Functions of the trainer that rows of the table replace: what it does not offer
REPLACED = {"dpo-sum": ("measure_errors", measure_sum), "dpo-latent-inverted": ("noise_batch", invert)}


@contextlib.contextmanager
def replaced(method):
    if method not in REPLACED:
        yield
        return
    name, function = REPLACED[method]
    original = getattr(trainer, name)
    setattr(trainer, name, functools.partial(function, original))
    try:
        yield
    finally:
        setattr(trainer, name, original)


def train(options):
    """Trains by options of the trainer. Returns what was logged."""
    run_script(trainer, options)
    (logs,) = (path for path in (Path(options["output_dir"]) / "logs").iterdir() if path.is_dir())
    return EventAccumulator(str(logs)).Reload()


# Measuring


@functools.cache
def load_measuring(base):
    """A base in a pipeline that draws what is measured, and what judges it."""
    pipeline = load_pipeline(base)
    options = {"timestep_spacing": "trailing"}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **options)
    return pipeline, Explanations()


def test_noise(seed):
    """Runs of one seed are compared from the same noise, those of another from another."""
    return TEST_NOISE + 1_000 * seed


def measured_scenes(name):
    return dict(zip(("choosing", "test"), split_scenes()[1:]))[name]


def summarize(rewards):
    """Means by part, and of all pictures the total, rounded."""
    parts = {name: round(values.mean().item(), 4) for name, values in rewards._asdict().items()}
    return {**parts, "total": [round(value, 4) for value in rewards.total.tolist()]}


def measure(base, name, seed, lora=None, repeats=None):
    """
    What `summarize` gives of pictures of the captions that choose (`"choosing"`) or that results are from (`"test"`): all
    captions once, all once more, and so on, so that the first pictures are the same whatever `repeats` is.
    """
    pipeline, explanations = load_measuring(base)
    noise = {"choosing": CHOOSING_NOISE, "test": test_noise(seed)}[name]
    scenes = measured_scenes(name) * (repeats or PICTURES_PER_CAPTION)
    unet, pipeline.unet = pipeline.unet, copy.deepcopy(pipeline.unet)
    if lora is not None:
        pipeline.load_lora_weights(lora)
        pipeline.fuse_lora()
    pictures = draw(pipeline, scenes, noise, MEASURED_INFERENCE_STEPS)
    pipeline.unet = unet
    return summarize(reward(pictures, scenes, explanations))


@torch.no_grad()
def measure_best(base):
    """Of pictures that nothing is wrong with, outlined, as the base's VAE passes them on: no policy draws better ones."""
    pipeline, explanations = load_measuring(base)
    scenes = split_scenes()[2] * 4
    pictures = render(scenes, torch.Generator().manual_seed(SEED), well_drawn=1.0)
    outlined = reward(pictures, scenes, explanations).style > 0.5
    scenes, pictures = [scene for scene, has in zip(scenes, outlined) if has], pictures[outlined]
    decoded = pipeline.vae.decode(encode(pipeline.vae, 2 * pictures - 1)).sample
    return summarize(reward((decoded / 2 + 0.5).clamp(0, 1), scenes, explanations))


def save(result, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    incomplete = file.with_suffix(f".{os.getpid()}")
    incomplete.write_text(json.dumps(result) + "\n")
    incomplete.replace(file)
    return result


def measure_references(folder, results):
    """What `summarize` gives of the best pictures and, with the first seed's noise, of the base's."""
    base = base_of(folder)
    for name, measured in (
        ("best", lambda: measure_best(base)),
        ("base", lambda: measure(base, "test", SEED, repeats=TEST_PICTURES_PER_CAPTION)),
        ("base-choosing", lambda: measure(base, "choosing", SEED)),
    ):
        if not (results / f"{name}.json").is_file():
            save(measured(), results / f"{name}.json")


# The experiment


def run_name(method, learning_rate, beta, seed):
    return f"{method}-{learning_rate:g}-{seed}" if beta is None else f"{method}-{learning_rate:g}-{beta:g}-{seed}"


def run(folder, results, method, learning_rate, beta, seed, steps, best_step=None):
    """
    One run: what it gives after all `steps` on the captions that choose, for the first seed, and on those of the results, with
    more pictures after the `best_step`, if that is given. What its file holds is not measured again.
    """
    name = run_name(method, learning_rate, beta, seed)
    file, output_dir = results / f"{name}.json", folder / "runs" / name
    result = {"method": method, "learning_rate": learning_rate, "beta": beta, "seed": seed}
    if file.is_file():
        result = json.loads(file.read_text())
        # That with the most steps.
        steps = tuple(sorted({*steps, *(int(step) for step in result.get("choosing", result.get("test")))}))
    options = training_options(folder, output_dir, method, learning_rate, beta, seed, steps)
    command = training_command(options)
    if len({re.sub(r" --max_train_steps \d+", "", text) for text in (command, result.get("command", command))}) > 1:
        raise ValueError(f"{file} is of another command: {result['command']}. Remove it, or give other folders.")
    repeats = {}
    if seed == SEED:
        repeats["choosing"] = dict.fromkeys(steps, PICTURES_PER_CAPTION)
    if best_step is not None:
        repeats["test"] = {**dict.fromkeys(steps, PICTURES_PER_CAPTION), best_step: TEST_PICTURES_PER_CAPTION}
    missing = [
        (name, step, number)
        for name, numbers in sorted(repeats.items())
        for step, number in numbers.items()
        if len(result.get(name, {}).get(str(step), {"total": []})["total"]) < number * len(measured_scenes(name))
    ]
    if missing:
        times = []
        hook = register_optimizer_step_post_hook(lambda *_: times.append(time.process_time()))
        with replaced(method):
            train(options)
        hook.remove()
        if len(times) > 2:
            # The fastest tenth: whatever else the machine did, and checkpoints, are in others.
            seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
            result["seconds_per_step"] = round(quantiles(seconds, n=10)[0], 4)
        for name, step, number in missing:
            measured = measure(base_of(folder), name, seed, output_dir / f"checkpoint-{step}", number)
            result[name] = {**result.get(name, {}), str(step): measured}
        save({**result, "command": command}, file)
    return result


def goal(method, measured):
    """What the pairs of a method are labelled by, of what `summarize` gave: the mean reward, or one part of it."""
    if method.endswith("-by-match"):
        return measured["match"]
    if method.endswith("-by-drawing"):
        return (measured["quality"] + measured["style"]) / 2
    return fmean(measured["total"])


def choose(method, load):
    """
    Learning rate, beta and step of a method. Learning rate and beta are multiplied by `FACTORS` in turn as long as that makes
    the best step better, until nothing does; of these, the best step of a longer run.

    Args:
        load (`callable`): gives the result of a learning rate, a beta and steps with the first seed.

    Returns:
        `tuple`: learning rate, beta, the steps that were measured, and of these the best.
    """
    steps = FILTERED_STEPS if METHODS[method].items() >= FILTERED.items() else STEPS

    def scores(settings, steps):
        measured = load(*settings, steps)["choosing"]
        return {step: goal(method, measured[str(step)]) for step in steps}

    def best_step(settings, steps):
        return max(steps, key=scores(settings, steps).get)

    def score(settings):
        return max(scores(settings, steps).values())

    settings, before = (LEARNING_RATE, BETAS.get(METHODS[method].get("loss_type"), BETA_DPO)), None
    while settings != before:
        before = settings
        for index, factor in itertools.product((0, 1), FACTORS):
            while settings[index] is not None:
                changed = tuple(value * factor if i == index else value for i, value in enumerate(settings))
                if score(changed) <= score(settings):
                    break
                settings = changed
    while steps[-1] < MAX_STEPS and best_step(settings, steps) == steps[-1]:
        steps = (*steps, steps[-1] + steps[0])
    return *settings, steps, best_step(settings, steps)


def run_row(folder, results, method, num_seeds):
    """Chooses a method's settings, and trains and tests with as many seeds."""

    def load(rate, beta, steps):
        return run(folder, results, method, rate, beta, SEED, steps)

    rate, beta, steps, best_step = choose(method, load)
    for seed in range(num_seeds):
        run(folder, results, method, rate, beta, seed, steps, best_step)


def run_all(folder, results, num_workers):
    """All rows, each in one of some processes of one core: with three seeds, and then with all they are to have."""
    context, failed = multiprocessing.get_context("spawn"), {}
    with (
        ProcessPoolExecutor(num_workers, context, torch.set_num_threads, (1,)) as executor,
        tqdm(total=2 * len(METHODS), desc="Rows") as progress_bar,
    ):
        for at_most in (3, 5):
            rows = {
                method: executor.submit(run_row, folder, results, method, min(at_most, NUM_SEEDS[method]))
                for method in METHODS
            }
            for method, row in rows.items():
                if row.exception() is not None:
                    failed[method] = row.exception()
                progress_bar.update()
    if failed:
        raise RuntimeError(f"Rows failed; `all` takes up what is missing: {failed}")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="draw with the base, label and encode")
    everything = commands.add_parser("all", help="the whole experiment")
    everything.add_argument("--num_workers", type=int, default=2, help="rows at a time, a core each")
    some = commands.add_parser("run", help="train and measure some methods")
    some.add_argument("methods", metavar="METHOD", choices=list(METHODS), nargs="+", help=", ".join(METHODS))
    for command in (pairs, everything, some):
        command.add_argument("--folder", type=Path, default=Path("small-world"), help="where pairs and LoRAs are kept")
    for command in (everything, some):
        command.add_argument("--output_dir", type=Path, default=RESULTS, help="where results are written")
    return parser.parse_args(input_args)


def main(args):
    if args.command == "pairs" or not (args.folder / WORLD_NAME).is_file():
        make_pairs(args.folder)
    check_world(args.folder)
    if args.command != "pairs":
        measure_references(args.folder, args.output_dir / "runs")
    if args.command == "all":
        run_all(args.folder, args.output_dir / "runs", args.num_workers)
    elif args.command == "run":
        torch.set_num_threads(1)
        for method in args.methods:
            run_row(args.folder, args.output_dir / "runs", method, NUM_SEEDS[method])
    if args.command != "pairs":
        report = [str(Path(__file__).with_name("report.py")), "--output_dir", str(args.output_dir)]
        subprocess.run([sys.executable, *report], check=True)


if __name__ == "__main__":
    main(parse_args())
