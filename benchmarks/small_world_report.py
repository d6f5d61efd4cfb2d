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

"""What came out of `small_world.py all`: a table, plots and pictures.

python benchmarks/small_world_report.py     # reads small-world/runs, writes benchmarks/results/small_world
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import small_world  # noqa: E402
from PIL import Image  # noqa: E402

from eval_win_rate import compare  # noqa: E402


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
    """The runs of each method at the learning rate that its choosing captions preferred, one per seed, and all runs."""
    of_all = itertools.product(small_world.METHODS, small_world.LEARNING_RATES, small_world.SEEDS)
    files = [small_world.result_file(folder, *arguments) for arguments in of_all]
    results = [json.loads(file.read_text()) for file in files if file.is_file()]
    chosen = {
        method: [result for result in results if (result["method"], result["learning_rate"]) == (method, rate)]
        for method, rate in small_world.best_learning_rates(results).items()
    }
    return chosen, results


def measure_base():
    """Rewards of the base's pictures, by seed and name."""
    pipeline, explanations = small_world.load_pipeline(small_world.ASSETS), small_world.Explanations()
    _, _, test = small_world.split_scenes()
    return {
        seed: small_world.measure(pipeline, test, small_world.test_noise(seed), explanations)
        for seed in small_world.SEEDS
    }


def final(result, part="total"):
    return np.array(result["test"][str(small_world.STEPS[-1])][part])


def curve(result, base):
    """Steps, seconds and mean reward of a run, from the base on."""
    steps = [str(step) for step in small_world.STEPS]
    rewards = [np.mean(base[result["seed"]]["total"]), *(np.mean(result["test"][step]["total"]) for step in steps)]
    return [0, *small_world.STEPS], [0, *(result["seconds"][step] for step in steps)], rewards


def win_rate(ours, theirs):
    """
    Share of pictures with the higher reward, ties counting half. Pictures of one caption are not independent, so that the 95 %
    confidence interval is that of the mean over captions (bootstrap).

    Args:
        ours, theirs (`list` of `np.ndarray` of shape `(N,)`): by seed, rewards of pictures of the same captions from the
            same noise, those of one caption together.
    """
    ours, theirs = (
        np.reshape(side, (len(side), -1, small_world.TEST_PICTURES_PER_SCENE)).swapaxes(0, 1)
        for side in (ours, theirs)
    )
    by_caption = [compare(a.flatten().tolist(), b.flatten().tolist()).win_rate for a, b in zip(ours, theirs)]
    resampled = np.random.default_rng(0).choice(by_caption, (10_000, len(by_caption))).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return f"{np.mean(by_caption):.0%} ({low:.0%} – {high:.0%})"


def same_seeds(ours, theirs):
    """Pairs of runs with the same seed."""
    by_seed = {run["seed"]: run for run in theirs}
    return [(run, by_seed[run["seed"]]) for run in ours if run["seed"] in by_seed]


def run_win_rate(pairs):
    return win_rate(*([final(run) for run in side] for side in zip(*pairs)))


def mean_and_spread(values):
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def table(chosen, base):
    columns = ["method", "learning rate", "reward", *PARTS[1:], "beats base", "beats latent twin"]
    columns += ["reward at its time", "implicit accuracy, latent", "ncp", "seconds"]
    base_means = " | ".join(mean_and_spread([np.mean(rewards[part]) for rewards in base.values()]) for part in PARTS)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", f"| base | | {base_means} |" + " |" * 6]
    for method, runs in chosen.items():
        means = [mean_and_spread([final(run, part).mean() for run in runs]) for part in PARTS]
        beats_base = win_rate([final(run) for run in runs], [np.array(base[run["seed"]]["total"]) for run in runs])
        pairs = same_seeds(runs, chosen.get(LATENT_TWINS.get(method), []))
        beats_twin = at_equal_time = ""
        if pairs:
            beats_twin = run_win_rate(pairs)
            at_equal_time = mean_and_spread(
                [np.interp(curve(twin, base)[1][-1], *curve(run, base)[1:]) for run, twin in pairs]
            )
        accuracies = (np.mean([run["implicit_accuracy"][space] for run in runs]) for space in ("latent", "ncp"))
        seconds = np.mean([curve(run, base)[1][-1] for run in runs])
        cells = [method, f"{runs[0]['learning_rate']:g}", *means, beats_base, beats_twin, at_equal_time]
        cells += [*(f"{accuracy:.2f}" for accuracy in accuracies), f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def duels(chosen):
    """Win rates between methods that differ in one thing."""
    lines = ["| | against | wins |", "|---|---|---|"]
    for ours, theirs in DUELS:
        pairs = same_seeds(chosen.get(ours, []), chosen.get(theirs, []))
        if pairs:
            lines.append(f"| {ours} | {theirs} | {run_win_rate(pairs)} |")
    return "\n".join(lines)


def learning_rate_table(results):
    """What learning rates were chosen by: the mean reward on captions that are in no other table."""
    rates = sorted({result["learning_rate"] for result in results})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for method in small_world.METHODS:
        means = {
            result["learning_rate"]: f"{np.mean(result['choosing']['total']):.3f}"
            for result in results
            if result["method"] == method and result["seed"] == small_world.SEEDS[0]
        }
        if means:
            lines.append(f"| {method} | {' | '.join(means.get(rate, '') for rate in rates)} |")
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
    """A row per method: the first test captions, all from the same noise."""
    pipeline = small_world.load_pipeline(small_world.ASSETS)
    scenes = small_world.split_scenes()[2][:NUM_SHOWN]
    rows = [("base", None)] + [(method, runs[0]) for method, runs in chosen.items()]
    figure, axes = plt.subplots(len(rows), NUM_SHOWN, figsize=(1.3 * NUM_SHOWN, 1.35 * len(rows)), squeeze=False)
    for (method, run), row in zip(rows, axes):
        if run is not None:
            pipeline.load_lora_weights(small_world.run_folder(folder, method, run["learning_rate"], run["seed"]))
        pictures = small_world.draw(pipeline, scenes, small_world.TEST_NOISE)
        for axis, scene, image in zip(row, scenes, small_world.to_pil(pictures)):
            axis.imshow(image.resize((144, 144), Image.Resampling.NEAREST))
            axis.set(xticks=[], yticks=[])
            if run is None:
                axis.set_title(scene.caption.replace(" on", "\non"), fontsize=5.5)
        row[0].set_ylabel(method, fontsize=6)
        pipeline.unload_lora_weights()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=130)


def main(args):
    chosen, results = load_results(args.folder)
    base = measure_base()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot(chosen, base, args.output_dir / "rewards.png")
    save_pictures(args.folder, chosen, args.output_dir / "pictures.png")
    commands = [result["command"] for result in results]
    (args.output_dir / "commands.txt").write_text("\n".join(commands) + "\n")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    num_pictures = len(base[small_world.SEEDS[0]]["total"])
    report = f"""# Small world

`python benchmarks/small_world.py all`, then `python benchmarks/small_world_report.py`; Python {platform.python_version()},
{versions}. The commands of all {len(results)} runs are in [`commands.txt`](commands.txt).

{table(chosen, base)}

![Reward against steps and seconds](rewards.png)

- *reward* is the mean of *quality* (sharp and even), *match* (with the caption) and *style* (a dark outline), each in [0, 1], after
  {small_world.STEPS[-1]} steps, of {num_pictures} pictures per seed. Captions are held out; runs of one seed start from the same noise.
  ± is the standard deviation over seeds {", ".join(map(str, small_world.SEEDS))}.
  A small shape without an outline fits a large one with an outline of the background's colour, and may be taken for it in *match*.
- *beats*: share of pictures with the higher reward than that from the same noise by the base, or by the same method in latent
  space (for variants of NCP-DPO: latent DPO), with its 95 % confidence interval over captions; the spread between trainings
  is not in it.
- *reward at its time*: interpolated at the seconds that the latent twin takes for all its steps.
- *implicit accuracy*: share of held-out pairs whose winner's error improves more than the loser's, measured in either space.
- *seconds* for all steps on one core, two runs at a time; loading, encoding and measuring the error scale (8 batches) come
  before.

## One thing apart

{duels(chosen)}

## The same captions from the same noise

![A row of pictures per method](pictures.png)

## Learning rates

By the mean reward on captions of their own, after {small_world.STEPS[-1]} steps with seed {small_world.SEEDS[0]}:

{learning_rate_table(results)}
"""
    (args.output_dir / "README.md").write_text(report)
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small-world"))
    parser.add_argument("--output_dir", type=Path, default=small_world.ROOT / "benchmarks" / "results" / "small_world")
    main(parser.parse_args())
