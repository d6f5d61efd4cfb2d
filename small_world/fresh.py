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


"""Trains settings that `experiment.py` has chosen again, with fresh seeds that each draw pairs and labels of their own.

    python small_world/fresh.py six                 # the six rows of README's table, ten seeds
    python small_world/fresh.py judge clean         # more studies, one after the other
    python small_world/fresh.py six --folder small-world-strong --output_dir small_world/results_strong
    python small_world/fresh.py shares              # what each judge's reward can gain from the pool, by part

`studies.py` lists the studies, and `analysis.md` says why they are as they are. Every training is a line of `fresh_runs.jsonl`
in the results; what is there is not trained again. Settings come from the runs of `experiment.py` in the same folder.
"""

import argparse
import functools
import random
import shutil
import time
from pathlib import Path

import experiment
import numpy as np
import pandas as pd
import protocol
import studies
import torch
from datasets import Dataset
from protocol import split_scenes
from scenes import Explanations, Reward, reward
from studies import JUDGES, STUDIES
from tqdm.auto import tqdm


POOL_NAME, WORLD_NAME, DONE_NAME = "pool.parquet", "fresh.sha256", "complete"


# Pairs


def pool_scenes():
    """Returns the scene of every picture of the pool."""
    return [scene for scene in split_scenes()[0] for _ in range(studies.POOL_SIZE)]


def make_pool(folder):
    """Draws the pool with the base, and writes its pictures and the parts of their reward."""
    scenes = pool_scenes()
    pictures = experiment.draw(experiment.load_pipeline(experiment.base_of(folder)), scenes, experiment.PAIRS_NOISE)
    parts = {name: values.tolist() for name, values in reward(pictures, scenes, Explanations())._asdict().items()}
    encoded = [experiment.encode_png(image) for image in experiment.to_pil(pictures)]
    folder.mkdir(parents=True, exist_ok=True)
    incomplete = folder / "incomplete-pool"
    Dataset.from_dict({"picture": encoded, **parts}).to_parquet(str(incomplete))
    incomplete.rename(folder / POOL_NAME)


def load_pool(folder):
    """Returns the pool's pictures as PNG, and their `Reward`."""
    pool = pd.read_parquet(folder / POOL_NAME)
    return pool["picture"].tolist(), Reward(*(torch.tensor(pool[name].to_numpy()) for name in Reward._fields))


def draw_pairs(folder, judge_name, seed):
    """
    Draws a seed's pairs: for each caption `experiment.PICTURES_PER_SCENE` pictures of the pool, every two of them a pair, with
    labels of a judge. Two judges label the same pairs.

    Returns:
        `list` of rows as `experiment.compare` gives them, and `torch.Tensor`: the judge's reward by the rows' uids.
    """
    pictures, parts = load_pool(folder)
    judge, rng = JUDGES[judge_name], random.Random(f"pictures of {seed}")
    chosen = [
        first + place
        for first in range(0, len(pictures), studies.POOL_SIZE)
        for place in rng.sample(range(studies.POOL_SIZE), experiment.PICTURES_PER_SCENE)
    ]
    scenes, rewards = pool_scenes(), judge.total(parts)[chosen]
    labels = random.Random(f"labels of {judge_name} of {seed}")
    rows = experiment.compare(
        [scenes[index] for index in chosen], [pictures[index] for index in chosen], rewards, labels, judge.temperature
    )
    return rows, rewards


def gaps_of(rows, rewards):
    """Returns the reward of each row's first picture minus that of its second."""
    return np.array([(rewards[int(row["image_0_uid"])] - rewards[int(row["image_1_uid"])]).item() for row in rows])


def filtered_rows(rows):
    """Returns the places of rows that an absolute winner won, by the rule of `tools/prepare_preferences.py filter`."""
    comparisons = pd.DataFrame(
        {
            "label": [row["label_0"] for row in rows],
            "prompt": pd.factorize(np.array([row["caption"] for row in rows], dtype=object))[0],
            "image_0": [int(row["image_0_uid"]) for row in rows],
            "image_1": [int(row["image_1_uid"]) for row in rows],
            "order": range(len(rows)),
        }
    )
    find = experiment.prepare_preferences.absolute_winner_rows
    return find(comparisons, min_wins=1, losers="all", max_pairs_per_prompt=None).tolist()


def agreed_rows(rows, gaps, temperature, rng, number):
    """Returns the places of `number` random rows whose label three further labels of the same judge repeat."""
    probabilities = 1 / (1 + np.exp(-gaps / temperature))
    agreed = [
        place
        for place, (row, probability) in enumerate(zip(rows, probabilities))
        if all((rng.random() < probability) == bool(row["label_0"]) for _ in range(3))
    ]
    return sorted(rng.sample(agreed, number))


def matched_rows(rows, gaps, filtered, rng):
    """
    Returns the places of as many rows as are filtered, none of which is: for each filtered row, in random order, the row
    that is left whose winner is better than its loser by most nearly as much.
    """
    ahead = np.where([row["label_0"] == 1 for row in rows], gaps, -gaps)
    left = np.setdiff1d(np.arange(len(rows)), filtered)
    found = []
    for place in rng.sample(filtered, len(filtered)):
        nearest = np.abs(ahead[left] - ahead[place]).argmin()
        found.append(int(left[nearest]))
        left = np.delete(left, nearest)
    return sorted(found)


def select_rows(rows, rewards, judge_name, selection, seed):
    """Returns those rows that a selection of `studies.Row` keeps."""
    if selection == "all":
        return rows
    gaps, filtered = gaps_of(rows, rewards), filtered_rows(rows)
    rng = random.Random(f"{selection} of {judge_name} of {seed}")
    if selection == "agreed":
        kept = agreed_rows(rows, gaps, JUDGES[judge_name].temperature, rng, len(filtered))
    else:
        kept = matched_rows(rows, gaps, filtered, rng) if selection == "matched" else filtered
    return [rows[place] for place in kept]


def make_pairs(folder, judge_name, selection, seed):
    """Writes and encodes a seed's pairs unless an earlier call has. Returns the folder of the encoded pairs."""
    name = f"{judge_name}-{selection}-{seed}"
    encoded = folder / f"encoded-{name}"
    if not (encoded / DONE_NAME).is_file():
        rows, rewards = draw_pairs(folder, judge_name, seed)
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        selected = Dataset.from_list(select_rows(rows, rewards, judge_name, selection, seed))
        selected.to_parquet(str(folder / name / "train.parquet"))
        experiment.encode_pairs(folder, name)
        (encoded / DONE_NAME).touch()
    return encoded


# Training and measuring


def checkpoints_around(step):
    """Returns the three steps after which a training with this chosen step is measured; none is the base's."""
    middle = max(step, 2 * studies.STEPS_AROUND)
    return tuple(middle + offset for offset in (-studies.STEPS_AROUND, 0, studies.STEPS_AROUND))


def measure(folder, judge_name, seed, lora=None):
    """Measures a seed's pictures. `"total"` is the judge's reward of every picture."""
    repeats = studies.PICTURES_PER_CAPTION
    parts = experiment.draw_and_reward(experiment.base_of(folder), "test", seed, lora, repeats)
    total = JUDGES[judge_name].total(parts)
    return {**experiment.summarize(parts), "total": [round(value, 4) for value in total.tolist()]}


def train(folder, runs_file, study, row_name, seed, settings):
    """Makes a training of a study, measures it and adds it to `runs_file`."""
    row, (rate, beta, _, step) = STUDIES[study].rows[row_name], settings
    steps, name = checkpoints_around(step), studies.run_name(study, row_name, seed)
    output_dir = folder / "fresh-runs" / name
    start = time.process_time()
    options = {
        **experiment.training_options(folder, output_dir, row.method, rate, beta, seed, steps),
        **row.options,
        "encoded_data_dir": make_pairs(folder, row.judge, row.selection, seed),
    }
    paired = time.process_time()
    experiment.run_script(experiment.trainer, options)
    trained = time.process_time()
    test = {str(step): measure(folder, row.judge, seed, output_dir / f"checkpoint-{step}") for step in steps}
    seconds = {"pairs": paired - start, "training": trained - paired, "measuring": time.process_time() - trained}
    result = {"name": name, "study": study, "row": row_name, "seed": seed, "learning_rate": rate, "beta": beta}
    result |= {"seconds": {part: round(value, 1) for part, value in seconds.items()}, "test": test}
    protocol.append_run(runs_file, {**result, "command": experiment.training_command(options)})
    shutil.rmtree(output_dir)


def run_seed(folder, runs_file, study, seed, settings):
    """Makes what `runs_file` lacks of a seed of a study: the base's pictures and the trainings."""
    runs = protocol.load_runs(runs_file)
    for judge_name in dict.fromkeys(row.judge for row in STUDIES[study].rows.values()):
        name = studies.base_name(judge_name, seed)
        if name not in runs:
            protocol.append_run(runs_file, {"name": name, **measure(folder, judge_name, seed)})
    for row_name in STUDIES[study].rows:
        if studies.run_name(study, row_name, seed) not in runs:
            train(folder, runs_file, study, row_name, seed, settings[row_name])


def run_study(folder, output_dir, study, num_workers):
    """Makes a study, `num_workers` seeds at a time, one core each."""
    rows, chosen_file = STUDIES[study].rows, output_dir / protocol.RUNS_NAME
    if not all(protocol.NUM_SEEDS[row.method] for row in rows.values()):
        # Only studies measure these methods, so their settings may have to be chosen first.
        experiment.open_world(folder)
    settings = {name: experiment.choose_settings(folder, chosen_file, row.method) for name, row in rows.items()}
    with experiment.create_workers(num_workers) as executor:
        start = functools.partial(executor.submit, run_seed, folder, output_dir / studies.RUNS_NAME, study)
        seeds = [start(seed, settings) for seed in STUDIES[study].seeds]
        failed = [future.exception() for future in tqdm(seeds, desc=study) if future.exception() is not None]
    if failed:
        raise RuntimeError(f"Seeds of the study {study} failed: {failed}. Run it again to make what is missing.")


# Shares


def describe_shares(parts, judge):
    """
    Returns lines that say, for each part, how much the best picture of a caption's pool gains over the mean picture, and which
    share of the judge's gain that is.
    """
    totals, parts = judge.total(parts).reshape(-1, studies.POOL_SIZE), dict(zip(Reward._fields, parts))
    best = totals.argmax(dim=1, keepdim=True)
    gains = {}
    for name, values in parts.items():
        values = values.reshape(-1, studies.POOL_SIZE)
        gains[name] = (values.gather(1, best)[:, 0] - values.mean(dim=1)).mean().item()
    differences = (totals[:, :, None] - totals[:, None, :]).abs()
    different = ~torch.eye(studies.POOL_SIZE, dtype=bool)
    right = torch.sigmoid(differences / judge.temperature)[:, different].mean().item()
    whole = sum(weight * gain for weight, gain in zip(judge.weights, gains.values()))
    lines = [
        f"{name}: weight {weight:.3f}, gain {gain:+.3f}, share {weight * gain / whole:.0%}"
        for (name, gain), weight in zip(gains.items(), judge.weights)
    ]
    return [*lines, f"reward: gain {whole:+.3f}; {right:.0%} of labels are right"]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", metavar="STUDY", choices=[*STUDIES, "shares"], nargs="+", help=", ".join(STUDIES))
    parser.add_argument("--folder", type=Path, default=Path("small-world"), help="folder of pairs and LoRAs")
    parser.add_argument("--output_dir", type=Path, default=protocol.RESULTS, help="folder of results")
    parser.add_argument("--num_workers", type=int, default=2, help="seeds at a time, one core each")
    return parser.parse_args(input_args)


def main(args):
    world = args.folder / WORLD_NAME
    if not world.is_file():
        make_pool(args.folder)
        world.write_text(experiment.digest_of_world(args.folder))
    experiment.check_world(args.folder, WORLD_NAME)
    for study in args.studies:
        if study != "shares":
            run_study(args.folder, args.output_dir, study, args.num_workers)
            continue
        _, parts = load_pool(args.folder)
        for name, judge in JUDGES.items():
            print(f"The {name} judge", *describe_shares(parts, judge), sep="\n  ")


if __name__ == "__main__":
    main(parse_args())
