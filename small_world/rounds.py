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

"""Two rounds of preference training in the small world, judged by its true reward: does the second one gain?

    python small_world/rounds.py    # three seeds, 7 minutes each on one core; what is there is not run again

Round 1 trains a LoRA on pairs of pictures by the base. Round 2 draws the same captions with it, from other noise, has them
compared by the same judge and trains a second LoRA on top of the first. The control trains its second LoRA in the same way for
as many steps, on the pairs of round 1 again. The loss is DPO's in latent space: it gains as much here as in feature space, in
less time. Writes `results/rounds.md` and what it is computed from, `rounds.json`.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from statistics import fmean, stdev

import experiment
from scenes import Explanations, reward
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import encode_preferences  # noqa: E402
import train_ncp_dpo_sd15  # noqa: E402


# Of the captions to train on: enough pairs for the steps, and half the time to draw and encode them
NUM_SCENES = 80
STEPS, LEARNING_RATE, BETA_DPO = 200, 3e-4, 200
PICTURES_PER_CAPTION = 2
# The first seed of the noise that round 2's pictures are drawn from; those of other seeds come 1,000 later.
ROUND_NOISE = 50_000
BASE = {"pretrained_model_name_or_path": os.path.relpath(experiment.ASSETS), **experiment.ENCODING}
LORAS = {"base": [], "round 1": ["round-1"], "round 2": ["round-1", "round-2"], "control": ["round-1", "control"]}
DUELS = (("round 1", "base"), ("round 2", "round 1"), ("control", "round 1"), ("round 2", "control"))


def encode(folder):
    """Encodes the pairs in a folder, as far as they are not."""
    options = {"dataset_name": folder / "pairs", "output_dir": folder / "encoded-pairs"}
    experiment.run_script(encode_preferences, {**BASE, **options})


def train(folder, output_dir, seed, first=None):
    """Trains a LoRA on the pairs in a folder, on top of a first LoRA if that is given, as far as it is not trained."""
    settings = LEARNING_RATE, BETA_DPO, seed, (STEPS // 2, STEPS)
    options = experiment.training_options(folder, output_dir, "dpo-latent", *settings)
    if first is not None:
        options["pretrained_lora_path"] = first
    experiment.run_script(train_ncp_dpo_sd15, {**options, **BASE})


def load_loras(pipeline, folders):
    for folder in folders:
        pipeline.load_lora_weights(folder, weight_name=train_ncp_dpo_sd15.WEIGHTS_NAME, adapter_name=folder.name)
    if folders:
        pipeline.set_adapters([folder.name for folder in folders])


def measure(pipeline, explanations, seed):
    """Rewards of pictures of the test captions, by name, from the same noise for all models of a seed."""
    scenes = [scene for scene in experiment.split_scenes()[2] for _ in range(PICTURES_PER_CAPTION)]
    rewards = reward(experiment.draw(pipeline, scenes, experiment.test_noise(seed)), scenes, explanations)
    parts = {"reward": rewards.total, **rewards._asdict()}
    return {name: [round(value, 4) for value in values.tolist()] for name, values in parts.items()}


def run(folder, seed):
    """Both rounds and the control; the result is kept in a file and not computed again."""
    runs, settings = folder / f"seed-{seed}", [NUM_SCENES, STEPS, LEARNING_RATE, BETA_DPO, PICTURES_PER_CAPTION]
    file, first = runs / "result.json", runs / "round-1"
    if file.is_file():
        result = json.loads(file.read_text())
        if result["settings"] != settings:
            raise ValueError(f"{file} has the settings {result['settings']}, not {settings}. Remove {runs}.")
        return result

    pipeline, explanations = experiment.load_pipeline(experiment.ASSETS), Explanations()
    train(folder, first, seed)
    if not (runs / "pairs" / "train.parquet").is_file():
        load_loras(pipeline, [first])
        scenes = experiment.split_scenes()[0][:NUM_SCENES]
        experiment.write_pairs(pipeline, explanations, scenes, ROUND_NOISE + 1_000 * seed, runs / "pairs")
        pipeline.unload_lora_weights()
    encode(runs)
    # Of another seed than round 1, or else the control would see its pairs with the same noise again.
    train(runs, runs / "round-2", 100 + seed, first)
    train(folder, runs / "control", 100 + seed, first)
    rewards = {}
    for name, loras in LORAS.items():
        load_loras(pipeline, [runs / lora for lora in loras])
        rewards[name] = measure(pipeline, explanations, seed)
        pipeline.unload_lora_weights()
    result = {"seed": seed, "settings": settings, "rewards": rewards}
    file.write_text(json.dumps(result))
    return result


def mean_and_error(values, form):
    """A mean over seeds and its standard error, as text."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):{form}} ± {error:{form.lstrip('+')}}"


def describe(results):
    """The report of all seeds' results."""
    parts = list(results[0]["rewards"]["base"])
    lines = [f"| | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name in LORAS:
        means = [[fmean(result["rewards"][name][part]) for result in results] for part in parts]
        lines.append(f"| {name} | {' | '.join(mean_and_error(values, '.3f') for values in means)} |")
    lines += ["", "| | difference in reward | wins |", "|---|---|---|"]
    for name, other in DUELS:
        pairs = [list(zip(*(result["rewards"][side]["reward"] for side in (name, other)))) for result in results]
        over = [fmean(ours - theirs for ours, theirs in pair) for pair in pairs]
        wins = [fmean((ours > theirs) + 0.5 * (ours == theirs) for ours, theirs in pair) for pair in pairs]
        lines.append(f"| {name} over {other} | {mean_and_error(over, '+.3f')} | {mean_and_error(wins, '.0%')} |")
    table, number = "\n".join(lines), len(results[0]["rewards"]["base"]["reward"])
    return f"""# Two rounds in the small world

`python small_world/rounds.py`: {NUM_SCENES} captions, {experiment.PICTURES_PER_SCENE} pictures of each and every two of these a pair in each round; latent DPO, {STEPS} steps
of 8 pairs for every LoRA, rank 16, β {BETA_DPO}, learning rate {LEARNING_RATE:g}.

{table}

- *round 1* is the base with a LoRA trained on pairs of the base's pictures. *round 2* is that with a second LoRA on top, trained on
  pairs of its own pictures of the same captions. *control* has its second LoRA from the pairs of round 1 again. The judge of all pairs
  is the true reward with noise.
- Rewards are of {number} pictures of held-out captions for each of {len(results)} seeds, from the same noise for all models of a seed. Differences
  are between pictures from the same noise. ± is the standard error over seeds, in which everything but the pairs of round 1 differs.
- The numbers of every picture are in [`rounds.json`](rounds.json).
"""


def main(args):
    world = args.folder / experiment.WORLD_NAME
    if not world.is_file():
        pipeline, scenes = experiment.load_pipeline(experiment.ASSETS), experiment.split_scenes()[0][:NUM_SCENES]
        experiment.write_pairs(pipeline, Explanations(), scenes, experiment.PAIRS_NOISE, args.folder / "pairs")
        world.write_text(experiment.digest_of_world(args.folder))
    experiment.check_world(args.folder)
    encode(args.folder)
    results = [run(args.folder, seed) for seed in tqdm(args.seed, desc="Seeds")]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "rounds.json").write_text(json.dumps(results) + "\n")
    (args.output_dir / "rounds.md").write_text(describe(results))
    print(describe(results))


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("small-world/rounds"), help="of pairs and runs")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).with_name("results"))
    return parser.parse_args(input_args)


if __name__ == "__main__":
    main(parse_args())
