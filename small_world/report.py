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

"""What came out of `experiment.py all`, which calls this: a table, plots and pictures.

`python small_world/report.py` reads `small-world/runs` and writes `small_world/results`.
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
import sys
from pathlib import Path

import experiment
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from base import encode
from PIL import Image
from scenes import Explanations, render, reward


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from eval_win_rate import compare  # noqa: E402


matplotlib.use("Agg")


LATENT_TWINS = {
    "sft-ncp": "sft-latent",
    "dpo-ncp": "dpo-latent",
    "cpo-ncp": "cpo-latent",
    "dpo-ncp-bf16-literal": "dpo-latent",
    "dpo-ncp-bf16-probe": "dpo-latent",
    "dpo-ncp-scale-1": "dpo-latent",
    "dpo-ncp-filtered": "dpo-latent-filtered",
}
# What a variant is for, in pictures won
DUELS = (
    ("dpo-ncp-bf16-probe", "dpo-ncp-bf16-literal"),
    ("dpo-ncp-bf16-probe", "dpo-ncp"),
    ("dpo-ncp", "dpo-ncp-scale-1"),
    ("dpo-ncp-filtered", "dpo-ncp"),
    ("dpo-latent-filtered", "dpo-latent"),
)
PARTS = ("total", "quality", "match", "style")
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "transformers")
NUM_SHOWN = 8


def load_results(folder):
    """
    The runs of each method at the learning rate that its choosing captions preferred, in the order of seeds, and those that
    it was chosen by. A `FileNotFoundError` if one is missing.
    """

    def load(*arguments):
        return json.loads(experiment.result_file(folder, *arguments).read_text())

    methods, rates, seeds = experiment.METHODS, experiment.LEARNING_RATES, experiment.SEEDS
    tried = [load(method, rate, seeds[0]) for method, rate in itertools.product(methods, rates)]
    best = experiment.best_learning_rates(tried).items()
    return {method: [load(method, rate, seed) for seed in seeds] for method, rate in best}, tried


@torch.no_grad()
def measure_best():
    """Rewards of pictures that nothing is wrong with, outlined, as the base's VAE passes them on: no policy draws better ones."""
    scenes = experiment.split_scenes()[2] * 4
    pictures = render(scenes, torch.Generator().manual_seed(experiment.SEED), well_drawn=1.0)
    explanations = Explanations()
    outlined = reward(pictures, scenes, explanations).style > 0.5
    scenes, pictures = [scene for scene, has in zip(scenes, outlined) if has], pictures[outlined]
    vae = experiment.load_pipeline(experiment.ASSETS).vae
    decoded = vae.decode(encode(vae, 2 * pictures - 1)).sample
    rewards = reward((decoded / 2 + 0.5).clamp(0, 1), scenes, explanations)
    return {name: value.numpy() for name, value in {**rewards._asdict(), "total": rewards.total}.items()}


def final(result, part="total"):
    return np.array(result["test"][str(experiment.STEPS[-1])][part])


def curve(result, base):
    """Steps, seconds and mean reward of a run, from the base on."""
    steps = result["test"].keys()
    rewards = [np.mean(base[result["seed"]]["total"]), *(np.mean(result["test"][step]["total"]) for step in steps)]
    return [0, *map(int, steps)], [0, *(result["seconds"][step] for step in steps)], rewards


def win_rate(ours, theirs):
    """
    Share of pictures with the higher reward, ties counting half. Neither pictures of one caption nor those of one training are
    independent: for the 95 % confidence interval both captions and trainings are drawn anew (bootstrap).

    Args:
        ours, theirs (`list` of `np.ndarray` of shape `(N,)`): by training, rewards of pictures of the same captions from the
            same noise, those of one caption together.
    """
    ours, theirs = (np.reshape(side, (len(side), -1, experiment.TEST_PICTURES_PER_SCENE)) for side in (ours, theirs))
    wins = np.array([[compare(a, b).win_rate for a, b in zip(*training)] for training in zip(ours, theirs)])
    rng = np.random.default_rng(0)
    trainings, captions = (rng.integers(size, size=(10_000, size)) for size in wins.shape)
    resampled = wins[trainings[:, :, None], captions[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return f"{wins.mean():.0%} ({low:.0%} – {high:.0%})"


def run_win_rate(ours, theirs):
    return win_rate(*([final(run) for run in runs] for runs in (ours, theirs)))


def mean_and_spread(values):
    """Of one value for each seed."""
    return f"{np.mean(values):+.3f} ± {np.std(values, ddof=1):.3f}"


def table(chosen, base, best):
    columns = ["method", "learning rate", "reward", *PARTS[1:], "over base", "beats base", "over twin", "beats twin"]
    columns += ["over twin at equal time", "implicit accuracy, latent", "ncp", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    of_base = {part: [np.mean(rewards[part]) for rewards in base.values()] for part in PARTS}
    for name, rewards in {"best possible": best, "base": of_base}.items():
        lines.append(f"| {name} | | {' | '.join(f'{np.mean(rewards[part]):.3f}' for part in PARTS)} |" + " |" * 8)
    for method, runs in chosen.items():
        rate = runs[0]["learning_rate"]
        at_edge = rate in (experiment.LEARNING_RATES[0], experiment.LEARNING_RATES[-1])
        cells = [method, f"{rate:g}" + " (edge)" * at_edge]
        cells += [f"{np.mean([final(run, part) for run in runs]):.3f}" for part in PARTS]
        of_base = [np.array(base[run["seed"]]["total"]) for run in runs]
        cells += [mean_and_spread([(final(run) - rewards).mean() for run, rewards in zip(runs, of_base)])]
        cells += [win_rate([final(run) for run in runs], of_base)]
        if method in LATENT_TWINS:
            twins = chosen[LATENT_TWINS[method]]
            cells += [mean_and_spread([(final(run) - final(twin)).mean() for run, twin in zip(runs, twins)])]
            cells += [run_win_rate(runs, twins)]
            over_twin_in_time = []
            for run, twin in zip(runs, twins):
                _, seconds, rewards = curve(run, base)
                over_twin_in_time.append(rewards[-1] - np.interp(seconds[-1], *curve(twin, base)[1:]))
            cells += [mean_and_spread(over_twin_in_time)]
        else:
            cells += 3 * [""]
        cells += [f"{np.mean([run['implicit_accuracy'][space] for run in runs]):.2f}" for space in ("latent", "ncp")]
        cells += [f"{np.mean([run['seconds'][str(experiment.STEPS[-1])] for run in runs]):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def duels(chosen):
    """Win rates between methods that differ in one thing."""
    lines = ["| | against | wins |", "|---|---|---|"]
    lines += [f"| {ours} | {theirs} | {run_win_rate(chosen[ours], chosen[theirs])} |" for ours, theirs in DUELS]
    return "\n".join(lines)


def steps_table(chosen, base):
    """Mean rewards after all steps."""
    lines = [f"| method | {' | '.join(map(str, experiment.LATENT_STEPS))} |"]
    lines += ["|---" * (len(experiment.LATENT_STEPS) + 1) + "|"]
    for method, runs in chosen.items():
        _, *means = np.mean([curve(run, base)[2] for run in runs], axis=0)
        means += [None] * (len(experiment.LATENT_STEPS) - len(means))
        lines.append(f"| {method} | {' | '.join('' if mean is None else f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def learning_rate_table(tried):
    """What learning rates were chosen by: the mean reward on captions that are in no other table."""
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in experiment.LEARNING_RATES)} |"]
    lines += ["|---" * (len(experiment.LEARNING_RATES) + 1) + "|"]
    for method, results in itertools.groupby(tried, key=lambda result: result["method"]):
        means = [f"{np.mean(result['choosing']['total']):.3f}" for result in results]
        lines.append(f"| {method} | {' | '.join(means)} |")
    return "\n".join(lines)


def plot(chosen, base, path):
    """Reward against steps and against seconds."""
    losses_and_spaces = [method for method in chosen if method.count("-") == 1]
    variants = [method for method in chosen if method.startswith("dpo")]
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharey=True)
    for row, methods in zip(axes, (losses_and_spaces, variants)):
        for method in methods:
            curves = [curve(run, base) for run in chosen[method]]
            steps, seconds, rewards = (np.array(values) for values in zip(*curves))
            for axis, x in zip(row, (steps.mean(axis=0), seconds.mean(axis=0))):
                style = "--" if "latent" in method else "-"
                (line,) = axis.plot(x, rewards.mean(axis=0), style, marker=".", label=method)
                axis.fill_between(x, rewards.min(axis=0), rewards.max(axis=0), color=line.get_color(), alpha=0.12)
        row[0].set(ylabel="true reward on held-out captions", xlabel="steps")
        row[1].set(xlabel="seconds of training on one core")
        row[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def save_pictures(folder, chosen, path):
    """A row per method: the first test captions, the first picture of each that was measured with the first seed."""
    pipeline = experiment.load_pipeline(experiment.ASSETS)
    scenes = experiment.split_scenes()[2][:NUM_SHOWN]
    repeated = [scene for scene in scenes for _ in range(experiment.TEST_PICTURES_PER_SCENE)]
    rows = [("base", None)] + [(method, runs[0]) for method, runs in chosen.items()]
    figure, axes = plt.subplots(len(rows), NUM_SHOWN, figsize=(1.3 * NUM_SHOWN, 1.35 * len(rows)), squeeze=False)
    for (method, run), row in zip(rows, axes):
        if run is not None:
            pipeline.load_lora_weights(experiment.run_folder(folder, method, run["learning_rate"], run["seed"]))
        pictures = experiment.draw(pipeline, repeated, experiment.test_noise(experiment.SEEDS[0]))
        pictures = pictures[:: experiment.TEST_PICTURES_PER_SCENE]
        for axis, scene, image in zip(row, scenes, experiment.to_pil(pictures)):
            axis.imshow(image.resize((144, 144), Image.Resampling.NEAREST))
            axis.set(xticks=[], yticks=[])
            if run is None:
                axis.set_title(scene.caption.replace(" on", "\non"), fontsize=5.5)
        row[0].set_ylabel(method, fontsize=6)
        pipeline.unload_lora_weights()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=130)


def main(args):
    experiment.check_world(args.folder)
    chosen, tried = load_results(args.folder)
    base = {seed: experiment.measure_base(seed) for seed in experiment.SEEDS}
    choosing_base = experiment.measure(
        experiment.load_pipeline(experiment.ASSETS),
        experiment.split_scenes()[1],
        experiment.CHOOSING_NOISE,
        Explanations(),
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot(chosen, base, args.output_dir / "rewards.png")
    save_pictures(args.folder, chosen, args.output_dir / "pictures.png")
    commands = [result["command"] for result in [*tried, *(run for runs in chosen.values() for run in runs[1:])]]
    (args.output_dir / "commands.txt").write_text("\n".join(commands) + "\n")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    num_pictures = len(base[experiment.SEEDS[0]]["total"])
    report = f"""# Small world

`python small_world/experiment.py all`; Python {platform.python_version()}, {versions}. The commands of all {len(commands)} runs are in
[`commands.txt`](commands.txt).

{table(chosen, base, measure_best())}

![Reward against steps and seconds](rewards.png)

- *reward* is the mean of *quality* (sharp and even), *match* (with the caption) and *style* (a dark outline), each in [0, 1], after
  {experiment.STEPS[-1]} steps, of {num_pictures} pictures for each of {len(experiment.SEEDS)} seeds. Captions are held out.
  *best possible*: well-drawn, outlined pictures, encoded and decoded by the base's VAE.
- *over*, *beats*: difference in reward, and share of pictures with the higher one, to the picture from the same noise by the base,
  or by the twin: the same method in latent space (for variants of NCP-DPO: latent DPO), trained for as many steps.
  ± is the standard deviation between trainings with different seeds; 95 % confidence intervals are over captions and trainings.
- *over twin at equal time*: the twin was trained on, for {experiment.LATENT_STEPS[-1]} steps; its reward is interpolated at the seconds that the method took.
- *implicit accuracy*: share of held-out pairs whose winner's error improves more than the loser's, measured in either space.
- *seconds* for {experiment.STEPS[-1]} steps on one core, two runs at a time; loading, encoding and measuring the error scale (8 batches) come
  before.
- *(edge)*: no lower, or no higher, learning rate was tried than the one chosen.

## One thing apart

{duels(chosen)}

## The same captions from the same noise

![A row of pictures per method](pictures.png)

## Reward by steps

{steps_table(chosen, base)}

## Learning rates

By the mean reward on captions of their own, after {experiment.STEPS[-1]} steps with seed {experiment.SEEDS[0]}. The base's is {np.mean(choosing_base["total"]):.3f}.

{learning_rate_table(tried)}
"""
    (args.output_dir / "README.md").write_text(report)
    print(report)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small-world"))
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).with_name("results"))
    return parser.parse_args(input_args)


if __name__ == "__main__":
    main(parse_args())
