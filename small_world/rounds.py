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


"""Trains three rounds of preferences in the small world, and measures whether each round gains by the true reward.

    python small_world/rounds.py    # three seeds, 20 minutes on one core; a seed that is in the results is not run again

Round 1 trains a LoRA on pairs of pictures that the base has drawn. Round 2 draws the same captions with this LoRA, from other
noise, and trains on pairs of these pictures. `--pretrained_lora_path` gives it the LoRA to start from. Round 3 does the same
with the LoRA of round 2. The true reward with noise labels all pairs.

Two controls go on from the LoRA of round 1 for as many steps as rounds 2 and 3, on the pairs of round 1.
All trainings use DPO in latent space, whose steps take less time than those of NCP-DPO.

Every seed is a line of `results/rounds.jsonl`. This script writes `results/rounds.md` from it, and `report.py` the table in
docs/results.md as well.
"""

import argparse
from pathlib import Path

import experiment
import protocol
import report
from scenes import Explanations
from tqdm.auto import tqdm


# Half of the captions to train on: enough pairs for the steps, and half the time to draw and encode them.
NUM_SCENES = 80
STEPS, LEARNING_RATE, BETA_DPO = 200, 3e-4, 200
# With training seed 0, picture i of round 2 starts from the noise of seed `ROUND_NOISE + i`. Round 3 adds 10,000 to that, and
# training seed s adds 1,000 s.
ROUND_NOISE = 50_000


def make_pairs(folder, first_seed, lora=None):
    """Draws pictures with the base and a LoRA, labels pairs of them and encodes these. Existing pairs are not drawn again."""
    if not (folder / "pairs" / "train.parquet").is_file():
        pipeline, scenes = experiment.load_pipeline(experiment.ASSETS), protocol.split_scenes()[0][:NUM_SCENES]
        if lora is not None:
            pipeline.load_lora_weights(lora, weight_name=experiment.trainer.WEIGHTS_NAME)
        experiment.write_pairs(pipeline, Explanations(), scenes, first_seed, folder / "pairs")
    experiment.encode_pairs(folder, "pairs")


def train(folder, output_dir, seed, first=None):
    """Trains a LoRA on the pairs in `folder`, starting from the LoRA `first` if it is given. Returns its last checkpoint."""
    settings = LEARNING_RATE, BETA_DPO, seed, (STEPS // 2, STEPS)
    options = experiment.training_options(folder, output_dir, "dpo-latent", *settings)
    if first is not None:
        options["pretrained_lora_path"] = first
    experiment.train(options)
    return output_dir / f"checkpoint-{STEPS}"


def run(folder, seed):
    """Trains all rounds and controls of a seed. Returns the rewards of each model's pictures, all from the same noise."""
    runs = folder / f"seed-{seed}"
    loras = {"base": None, "round 1": train(folder, runs / "round-1", seed)}
    policy = control = loras["round 1"]
    for number in (2, 3):
        pairs = runs / f"pairs-{number}"
        make_pairs(pairs, ROUND_NOISE + 10_000 * (number - 2) + 1_000 * seed, policy)
        # The seed of round 1 would give the control the same pairs with the same noise again.
        training_seed = 100 * (number - 1) + seed
        policy = loras[f"round {number}"] = train(pairs, runs / f"round-{number}", training_seed, policy)
        control = loras[f"control {number}"] = train(folder, runs / f"control-{number}", training_seed, control)
    return {name: experiment.measure(experiment.ASSETS, "test", seed, lora) for name, lora in loras.items()}


def main(args):
    results_file = args.output_dir / report.ROUNDS_NAME
    results = protocol.load_runs(results_file)
    settings = {
        "num_scenes": NUM_SCENES,
        "pictures_per_scene": experiment.PICTURES_PER_SCENE,
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "beta_dpo": BETA_DPO,
    }
    for name, result in results.items():
        if result["settings"] != settings:
            raise ValueError(
                f"{results_file}: {name} has the settings {result['settings']}, not {settings}. Remove its line."
            )
    world = args.folder / experiment.WORLD_NAME
    if not world.is_file():
        make_pairs(args.folder, experiment.PAIRS_NOISE)
        world.write_text(experiment.digest_of_world(args.folder))
    experiment.check_world(args.folder)
    for seed in tqdm([seed for seed in args.seed if f"seed-{seed}" not in results], desc="Seeds"):
        rewards = run(args.folder, seed)
        protocol.append_run(results_file, {"name": f"seed-{seed}", "settings": settings, "rewards": rewards})
    report.write_rounds(args.output_dir)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("small-world/rounds"), help="folder of pairs and LoRAs")
    parser.add_argument("--output_dir", type=Path, default=protocol.RESULTS, help="folder of results")
    return parser.parse_args(input_args)


if __name__ == "__main__":
    main(parse_args())
