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

python benchmarks/small_world_report.py     # reads small_world/runs, writes benchmarks/results/small_world
"""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import small_world  # noqa: E402
from PIL import Image  # noqa: E402

from diffusers import StableDiffusionPipeline  # noqa: E402
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
PARTS = ("total", "quality", "match", "style")
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "transformers")
NUM_SHOWN = 8


def load_results(folder):
    """The runs of each method at the learning rate that its choosing prompts preferred, by seed."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]
    chosen = {}
    for method in small_world.METHODS:
        runs = [result for result in results if result["method"] == method]
        if runs:
            best = small_world.best_learning_rate(runs)
            chosen[method] = [result for result in runs if result["learning_rate"] == best]
    return chosen


def final(result, part="total"):
    return np.array(result["test"][str(small_world.STEPS[-1])][part])


def win_rate(ours, theirs):
    """
    Share of pictures with the higher reward, ties counting half, with its 95 % confidence interval (Wilson).

    Args:
        ours, theirs (`np.ndarray` of shape `(N,)`): rewards of pictures of the same captions from the same noise.
    """
    result = compare(ours.tolist(), theirs.tolist())
    return f"{result.win_rate:.1%} ({result.low:.0%} – {result.high:.0%})"


def table(chosen, base):
    lines = [
        "| method | learning rate | reward | quality | match | style | beats base | beats its latent twin"
        " | implicit accuracy, latent | ncp | seconds per 100 steps |",
        "|---" * 11 + "|",
        "| base | | " + " | ".join(f"{np.mean(base[part]):.3f}" for part in PARTS) + " | | | | | |",
    ]
    for method, runs in chosen.items():
        means = {part: [final(run, part).mean() for run in runs] for part in PARTS}
        ours = np.concatenate([final(run) for run in runs])
        beats_base = win_rate(ours, np.tile(base["total"], len(runs)))
        twins = {run["seed"]: run for run in chosen.get(LATENT_TWINS.get(method), [])}
        paired = [(final(run), final(twins[run["seed"]])) for run in runs if run["seed"] in twins]
        beats_twin = win_rate(*(np.concatenate(side) for side in zip(*paired))) if paired else ""
        spread = f" ± {np.std(means['total'], ddof=1):.3f}" if len(runs) > 1 else ""
        accuracy = {space: np.mean([run["implicit_accuracy"][space] for run in runs]) for space in ("latent", "ncp")}
        seconds = np.mean([run["seconds"][str(small_world.STEPS[-1])] for run in runs]) / small_world.STEPS[-1] * 100
        lines.append(
            f"| {method} | {runs[0]['learning_rate']:g} | {np.mean(means['total']):.3f}{spread} | "
            + " | ".join(f"{np.mean(means[part]):.3f}" for part in PARTS[1:])
            + f" | {beats_base} | {beats_twin} | {accuracy['latent']:.2f} | {accuracy['ncp']:.2f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def plot(chosen, base, path):
    """Reward against steps and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for method, runs in chosen.items():
        steps = np.array([0, *small_world.STEPS])
        seconds = np.array([0, *(np.mean([run["seconds"][str(step)] for run in runs]) for step in small_world.STEPS)])
        rewards = np.array(
            [
                [np.mean(base["total"]), *(np.mean(run["test"][str(step)]["total"]) for step in small_world.STEPS)]
                for run in runs
            ]
        )
        style = {"linestyle": "--" if "latent" in method else "-", "marker": "."}
        for axis, x in zip(axes, (steps, seconds)):
            (line,) = axis.plot(x, rewards.mean(axis=0), label=method, **style)
            axis.fill_between(x, rewards.min(axis=0), rewards.max(axis=0), color=line.get_color(), alpha=0.12)
    axes[0].set(xlabel="steps", ylabel="true reward on held-out captions")
    axes[1].set(xlabel="seconds of training on one core")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def save_pictures(folder, chosen, path):
    """A row per method: the first test captions, all from the same noise."""
    pipeline = small_world.load_pipeline(small_world.ASSETS)
    scenes = small_world.split_scenes()[2][:NUM_SHOWN]
    rows = [("base", None)] + [(method, runs[0]) for method, runs in chosen.items()]
    figure, axes = plt.subplots(len(rows), NUM_SHOWN, figsize=(1.3 * NUM_SHOWN, 1.35 * len(rows)), squeeze=False)
    for (method, run), row in zip(rows, axes):
        if run is not None:
            name = f"{method}-{run['learning_rate']:g}-{run['seed']}"
            pipeline.load_lora_weights(folder / "runs" / name)
        for axis, scene, picture in zip(row, scenes, small_world.draw(pipeline, scenes, 30_000)):
            image = StableDiffusionPipeline.numpy_to_pil(picture.permute(1, 2, 0).numpy())[0]
            axis.imshow(image.resize((144, 144), Image.Resampling.NEAREST))
            axis.set(xticks=[], yticks=[])
            if run is None:
                axis.set_title(scene.caption.replace(" on", "\non"), fontsize=5.5)
        row[0].set_ylabel(method, fontsize=6)
        pipeline.unload_lora_weights()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=130)


def main(args):
    chosen = load_results(args.folder)
    pipeline, explanations = small_world.load_pipeline(small_world.ASSETS), small_world.Explanations()
    base = small_world.measure(pipeline, small_world.split_scenes()[2], 30_000, explanations)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot(chosen, base, args.output_dir / "rewards.png")
    save_pictures(args.folder, chosen, args.output_dir / "pictures.png")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    num_seeds = max(len(runs) for runs in chosen.values())
    report = f"""# Small world

`python benchmarks/small_world.py all`, then `python benchmarks/small_world_report.py`; Python {platform.python_version()},
{versions}. {small_world.STEPS[-1]} steps, up to {num_seeds} seeds (± is their standard deviation), learning rates chosen on
captions of their own; {len(base["total"])} pictures of held-out captions a run, all methods from the same noise. Win rates are
with their 95 % confidence intervals.

{table(chosen, base)}

![Reward against steps and seconds](rewards.png)

![The same captions and noise by every method](pictures.png)
"""
    (args.output_dir / "README.md").write_text(report)
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small_world"))
    parser.add_argument("--output_dir", type=Path, default=small_world.ROOT / "benchmarks" / "results" / "small_world")
    main(parser.parse_args())
