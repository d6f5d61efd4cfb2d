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

    python small_world/experiment.py pairs    # what the base draws, labelled by a hidden preference, and encoded
    python small_world/experiment.py run dpo-ncp --learning_rate 1e-3 --seed 0 1 2     # a row of the table: some minutes
    python small_world/experiment.py all      # all runs, two at a time, and the report; what is there is not run again

What pictures show and how good they are is in `scenes.py`; `base.py` trains the model that draws them. Pairs are labelled
as people do it, the better picture winning only more often (Bradley-Terry), encoded once by `tools/encode_preferences.py`
and trained on through the command line of `train_ncp_dpo_sd15.py`. How good pictures of other captions then are is known
exactly.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median

import torch
from base import ASSETS, encode
from datasets import Dataset
from PIL import Image
from scenes import RESOLUTION, SCENES, Explanations, reward
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.auto import tqdm

from diffusers import DDPMScheduler, StableDiffusionPipeline


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ncp_loss import (  # noqa: E402
    NoiseConditionedPerception,
    adapters_disabled,
    latent_error,
    preference_loss,
)


SEED = 0
# Prompts to train on; the others are halved into those that choose the learning rate and those that the results are from.
NUM_TRAINING_SCENES = 160
PICTURES_PER_SCENE = 6
TEMPERATURE = 0.05  # of the choice: a difference in reward of 0.05 decides 73 % of the time
GUIDANCE_SCALE = 2.0
NUM_INFERENCE_STEPS = 20
TEST_PICTURES_PER_SCENE = 2
WORLD_NAME = "world.sha256"
# The first seed of the noise that pictures are drawn from
PAIRS_NOISE, HELDOUT_NOISE, CHOOSING_NOISE, TEST_NOISE = 10_000, 20_000, 30_000, 40_000
# Training in bf16 reads the same tensors.
ENCODING = {"resolution": RESOLUTION, "no_hflip": None, "mixed_precision": "no"}
# The likelihood's sum over elements is a mean in the loss: 5000 for SD 1.5's 16,384 elements are 176 for 576.
BETA_DPO = 200
STEPS = (100, 200, 300)
# In feature space the same steps take longer. Latent runs go on, to be compared at equal time.
LATENT_STEPS = (*STEPS, 450)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
METHODS = {
    "sft-latent": {"loss_type": "sft", "loss_space": "latent"},
    "sft-ncp": {"loss_type": "sft"},
    "dpo-latent": {"loss_type": "dpo", "loss_space": "latent"},
    "dpo-ncp": {"loss_type": "dpo"},
    "cpo-latent": {"loss_type": "cpo", "loss_space": "latent"},
    "cpo-ncp": {"loss_type": "cpo"},
    "dpo-ncp-bf16-literal": {"loss_type": "dpo", "mixed_precision": "bf16", "ncp_probe_rms": 0},
    "dpo-ncp-bf16-probe": {"loss_type": "dpo", "mixed_precision": "bf16"},
    "dpo-ncp-scale-1": {"loss_type": "dpo", "ncp_error_scale": 1},
    "dpo-latent-filtered": {"loss_type": "dpo", "loss_space": "latent", "encoded_data_dir": "encoded-filtered"},
    "dpo-ncp-filtered": {"loss_type": "dpo", "encoded_data_dir": "encoded-filtered"},
}


# Preferences


def split_scenes():
    """Scenes to train on, to choose learning rates with, and to measure with."""
    scenes = random.Random(SEED).sample(SCENES, len(SCENES))
    middle = (NUM_TRAINING_SCENES + len(scenes)) // 2
    return scenes[:NUM_TRAINING_SCENES], scenes[NUM_TRAINING_SCENES:middle], scenes[middle:]


def load_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, scenes, first_seed):
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
                num_inference_steps=NUM_INFERENCE_STEPS,
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
    """Writes the pairs, and those of absolute winners alone."""
    training, _, _ = split_scenes()
    write_pairs(pipeline, explanations, training, PAIRS_NOISE, folder / "pairs")
    tool = [sys.executable, str(ROOT / "tools" / "prepare_preferences.py")]
    source = ["--dataset_name", str(folder / "pairs")]
    kept = folder / "kept.parquet"
    kept.unlink(missing_ok=True)
    shutil.rmtree(folder / "filtered", ignore_errors=True)
    subprocess.run([*tool, "filter", *source, "--output_file", str(kept)], check=True)
    subprocess.run(
        [*tool, "convert", "rows", "--rows_file", str(kept), *source, "--output_dir", str(folder / "filtered")],
        check=True,
    )


def encode_pairs(folder, name):
    """Turns the pairs in `folder / name` into what training reads, in `folder / f"encoded-{name}"`."""
    # Those there may be of other pairs.
    shutil.rmtree(folder / f"encoded-{name}", ignore_errors=True)
    options = {
        "pretrained_model_name_or_path": ASSETS,
        "dataset_name": folder / name,
        **ENCODING,
        "output_dir": folder / f"encoded-{name}",
    }
    run_script(script_words("tools/encode_preferences.py", options))


def digest_of_world():
    """Of what pairs and results depend on: the base model, how it draws, how its pictures are judged, and how encoded."""
    files = [*sorted(ASSETS.rglob("*.safetensors")), Path(__file__).with_name("scenes.py")]
    drawing = (
        SEED,
        NUM_TRAINING_SCENES,
        PICTURES_PER_SCENE,
        TEST_PICTURES_PER_SCENE,
        GUIDANCE_SCALE,
        NUM_INFERENCE_STEPS,
    )
    contents = [file.read_bytes() for file in files] + [repr((*drawing, TEMPERATURE, ENCODING)).encode()]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def check_world(folder):
    """A `ValueError` if the pairs in `folder`, and so the runs on them, are of another world."""
    if (folder / WORLD_NAME).read_text() != digest_of_world():
        raise ValueError(
            f"--folder {folder} holds pairs of another base model, reward or encoding. Give another one, or remove it."
        )


def make_pairs(folder):
    """Writes the pairs to train on, encoded as well, and others of captions that are not trained on."""
    if (folder / "runs").exists():
        raise ValueError(f"--folder {folder} holds runs on its pairs. Give another one, or remove it.")
    pipeline, explanations = load_pipeline(ASSETS), Explanations()
    _, _, test = split_scenes()
    make_training_pairs(pipeline, explanations, folder)
    encode_pairs(folder, "pairs")
    encode_pairs(folder, "filtered")
    write_pairs(pipeline, explanations, test, HELDOUT_NOISE, folder / "heldout")
    (folder / WORLD_NAME).write_text(digest_of_world())


# The experiment


def script_words(script, options):
    """
    One of this repository's scripts with options, as words after `python` in the repository's root. Paths are made relative to
    it; options that are `None` are flags.
    """
    words = [script]
    for name, value in options.items():
        value = os.path.relpath(value, ROOT) if isinstance(value, Path) else value
        words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    return words


def run_script(words):
    """Runs `script_words` on one core."""
    print(shlex.join(["python", *words]), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def training_command(folder, output_dir, method, learning_rate, seed, steps):
    """What a user would run in the repository's root, as words after `python`, with checkpoints at all `steps`."""
    options = {
        "pretrained_model_name_or_path": ASSETS,
        "encoded_data_dir": "encoded-pairs",
        "resolution": RESOLUTION,
        "no_hflip": None,
        "rank": 16,
        "train_batch_size": 8,
        "beta_dpo": BETA_DPO,
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
    return script_words("train_ncp_dpo_sd15.py", options)


def train(words, output_dir):
    """Trains by a `training_command`. Returns what was logged."""
    run_script(words)
    (logs,) = (path for path in (output_dir / "logs").iterdir() if path.is_dir())
    return EventAccumulator(str(logs)).Reload()


def test_noise(seed):
    """Runs of one seed are compared from the same noise, those of another from another."""
    return TEST_NOISE + 1_000 * seed


def measure(pipeline, scenes, first_seed, explanations):
    """Rewards of pictures, by name, as lists."""
    scenes = [scene for scene in scenes for _ in range(TEST_PICTURES_PER_SCENE)]
    rewards = reward(draw(pipeline, scenes, first_seed), scenes, explanations)
    return {name: value.tolist() for name, value in {**rewards._asdict(), "total": rewards.total}.items()}


def measure_base(seed):
    """What `measure` gives of the base, to compare the runs of a seed with."""
    _, _, test = split_scenes()
    return measure(load_pipeline(ASSETS), test, test_noise(seed), Explanations())


@torch.no_grad()
def implicit_accuracy(pipeline, rows):
    """
    The share of pairs of which the policy improves the winner's error more than the loser's, in latent space and in feature
    space. Timesteps, spread over all there are, and noise are the same in every call.
    """
    unet, noise_scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(SEED)
    swapped = [("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0") for row in rows]
    images = [row[names[side]] for side in (0, 1) for row, names in zip(rows, swapped)]
    pixel_values = pipeline.image_processor.preprocess([Image.open(io.BytesIO(image)) for image in images])
    latents = encode(pipeline.vae, pixel_values) * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents[: len(rows)].shape, generator=generator)
    timesteps = torch.linspace(0, 999, len(rows)).long()[torch.randperm(len(rows), generator=generator)]
    encoder_hidden_states, _ = pipeline.encode_prompt([row["caption"] for row in rows], "cpu", 1, False)

    accuracies = {"latent": [], "ncp": []}
    perception = NoiseConditionedPerception(unet, noise_scheduler)
    for index in torch.arange(len(rows)).split(40):
        pair = torch.cat([index, index + len(rows)])
        target, t, condition = (torch.cat([values[index]] * 2) for values in (noise, timesteps, encoder_hidden_states))
        noisy_latents = noise_scheduler.add_noise(latents[pair], target, t)
        with adapters_disabled(unet):
            ref_pred = unet(noisy_latents, t, condition).sample
        model_pred = unet(noisy_latents, t, condition).sample
        anchor = perception.anchor(noisy_latents, t, target, condition, ref_pred=ref_pred)
        for space, errors, ref_errors in [
            ("latent", latent_error(model_pred, target), latent_error(ref_pred, target)),
            ("ncp", perception.error(model_pred, anchor), anchor.ref_errors),
        ]:
            accuracies[space] += [preference_loss(errors, ref_errors).implicit_accuracy.item()] * len(index)
    return {space: fmean(values) for space, values in accuracies.items()}


def run_folder(folder, method, learning_rate, seed):
    return folder / "runs" / f"{method}-{learning_rate:g}-{seed}"


def result_file(folder, method, learning_rate, seed):
    return run_folder(folder, method, learning_rate, seed) / "result.json"


def steps_of(method):
    """Steps after which pictures are measured."""
    return LATENT_STEPS if METHODS[method].get("loss_space") == "latent" else STEPS


def run(folder, method, learning_rate, seed):
    """One run; its result is kept in a file and not computed again."""
    file, steps = result_file(folder, method, learning_rate, seed), steps_of(method)
    words = training_command(folder, file.parent, method, learning_rate, seed, steps)
    command = shlex.join(["python", *words])
    if file.is_file():
        result = json.loads(file.read_text())
        if result["command"] != command:
            raise ValueError(
                f"{file} is of another command: {result['command']}. Remove it, or give another --folder."
            )
        return result
    result = {"method": method, "learning_rate": learning_rate, "seed": seed, "command": command}
    times = [event.wall_time for event in train(words, file.parent).Scalars("loss")]
    # Whatever else the machine did, and checkpoints, are not in the median.
    seconds_per_step = median(later - earlier for earlier, later in itertools.pairwise(times))
    result["seconds"] = {step: step * seconds_per_step for step in steps}
    result["test"] = {}
    pipeline, explanations = load_pipeline(ASSETS), Explanations()
    _, choosing, test = split_scenes()
    for step in steps:
        pipeline.load_lora_weights(file.parent / f"checkpoint-{step}")
        result["test"][step] = measure(pipeline, test, test_noise(seed), explanations)
        if step == STEPS[-1]:  # of latent runs as of all others
            result["choosing"] = measure(pipeline, choosing, CHOOSING_NOISE, explanations)
            heldout = Dataset.from_parquet(str(folder / "heldout" / "train.parquet"))
            result["implicit_accuracy"] = implicit_accuracy(pipeline, list(heldout))
        pipeline.unload_lora_weights()
    incomplete = file.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(result))
    incomplete.rename(file)
    return json.loads(file.read_text())


def print_result(result):
    """Rewards of a run from the base on."""
    by_step = {0: measure_base(result["seed"]), **result["test"]}
    for step, rewards in by_step.items():
        wins = fmean(ours > base for ours, base in zip(rewards["total"], by_step[0]["total"]))
        means = ", ".join(f"{name} {fmean(values):.3f}" for name, values in rewards.items())
        print(
            f"seed {result['seed']}, step {step}, {result['seconds'].get(step, 0):.0f} s: {means}, beats base {wins:.0%}"
        )
    print(
        "implicit accuracy:", ", ".join(f"{space} {value:.2f}" for space, value in result["implicit_accuracy"].items())
    )


def best_learning_rate(results):
    """Of one method's runs with the first seed, the learning rate that its choosing captions come out best with."""
    runs = [result for result in results if result["seed"] == SEEDS[0]]
    return max(runs, key=lambda result: fmean(result["choosing"]["total"]))["learning_rate"]


def best_learning_rates(results):
    """Of every method that has results, in the order of `METHODS`."""
    by_method = {method: [result for result in results if result["method"] == method] for method in METHODS}
    return {method: best_learning_rate(runs) for method, runs in by_method.items() if runs}


def run_all(folder):
    """Every method with every learning rate, and with the best one the other seeds. Two runs at a time, a core each."""

    def run_apart(arguments):
        method, learning_rate, seed = arguments
        log = folder / "logs" / f"{run_folder(folder, *arguments).name}.log"
        if not result_file(folder, *arguments).is_file():
            command = [sys.executable, __file__, "run", method, "--learning_rate", str(learning_rate)]
            command += ["--seed", str(seed), "--folder", str(folder)]
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as output:
                subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
        progress_bar.update()
        return run(folder, *arguments) if result_file(folder, *arguments).is_file() else log

    def run_two_at_a_time(all_arguments):
        with ThreadPoolExecutor(2) as executor:
            results = list(executor.map(run_apart, all_arguments))
        failed = [str(result) for result in results if isinstance(result, Path)]
        if failed:
            raise RuntimeError(f"Runs failed, see {', '.join(failed)}. `all` takes up those that are missing.")
        return results

    num_runs = len(METHODS) * (len(LEARNING_RATES) + len(SEEDS) - 1)
    with tqdm(total=num_runs, desc="Runs") as progress_bar:
        results = run_two_at_a_time(itertools.product(METHODS, LEARNING_RATES, SEEDS[:1]))
        best = best_learning_rates(results).items()
        run_two_at_a_time((method, rate, seed) for method, rate in best for seed in SEEDS[1:])


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="draw with the base, label and encode")
    everything = commands.add_parser("all", help="the whole experiment")
    one = commands.add_parser("run", help="train and measure one method")
    one.add_argument("method", choices=list(METHODS))
    one.add_argument("--learning_rate", type=float, default=1e-3)
    one.add_argument("--seed", type=int, nargs="+", default=[0])
    for command in (pairs, everything, one):
        command.add_argument("--folder", type=Path, default=Path("small-world"), help="where pairs and runs are kept")
    return parser.parse_args(input_args)


def main(args):
    if args.command == "pairs" or not (args.folder / WORLD_NAME).is_file():
        make_pairs(args.folder)
    check_world(args.folder)
    if args.command == "all":
        run_all(args.folder)
        report = [str(Path(__file__).with_name("report.py")), "--folder", str(args.folder)]
        subprocess.run([sys.executable, *report], check=True)
    elif args.command == "run":
        for seed in args.seed:
            print_result(run(args.folder, args.method, args.learning_rate, seed))


if __name__ == "__main__":
    main(parse_args())
