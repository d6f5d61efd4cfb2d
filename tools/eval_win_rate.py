#!/usr/bin/env python
# coding=utf-8
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

r"""Compares two Stable Diffusion models: how often one's pictures score higher, for the same prompts from the same noise.

    accelerate launch tools/eval_win_rate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --lora_weights ncp-dpo-sd15 --prompts_file PartiPrompts.tsv --prompt_column Prompt --scorers pickscore clipscore \
      --output_dir parti

compares a LoRA with its base model. `--baseline_model_name_or_path` and `--baseline_lora_weights` name another opponent. `--unet`
and `--baseline_unet` replace a model's U-Net by one that was published alone. If the native resolutions differ, give
`--resolution`: without it the noise differs too. The output folder gets all pictures,
`scores.csv`, `summary.md` and `index.html`, a page with the result and both sides' pictures. Pictures that are there already
are not drawn again. To draw one side again, remove its folder.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import COUNT, ArgumentParser, locked_folder, name_source, refuse_foreign, require_package, run
from picture_records import load_picture
from pictures import (
    SETTINGS_NAME,
    Flags,
    add_drawing_arguments,
    add_prompt_arguments,
    choose_precision,
    draw_pictures,
    list_pictures,
    load_prompts,
    open_source,
    save_settings,
)
from scorers import add_scorer_arguments, load_scorers, score_pictures
from win_rate_page import describe_page


# The flags that give the model of each side.
SIDES = {
    "model": Flags(),
    "baseline": Flags("baseline_model_name_or_path", *(f"baseline_{flag}" for flag in Flags()[1:])),
}
# What pictures depend on beside the model and the scheduler.
DRAWING_ARGUMENTS = "num_images_per_prompt seed num_inference_steps guidance_scale resolution mixed_precision".split()


def parse_args(input_args=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("the two sides").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the model.")
    add("--variant", help="Variant of the model's files, for example fp16.")
    add("--revision", help="Revision of the model on the hub.")
    add("--lora_weights", help="Folder, .safetensors file or hub id of a LoRA. Default: none.")
    unet = "Hub id or folder of a U-Net that replaces the model's own"
    add("--unet", help=f"{unet}. Default: none.")
    add("--baseline_model_name_or_path", help="Hub id or folder of the opponent. Default: the same model.")
    add("--baseline_variant", help="Variant of its files. Default: --variant if the model is the same.")
    add("--baseline_revision", help="Its revision on the hub. Default: --revision if the model is the same.")
    add("--baseline_lora_weights", help="LoRA of the opponent. Default: none.")
    add("--baseline_unet", help=f"{unet}, for the baseline. Default: none.")
    add_evaluation_arguments(parser)
    parser.add_argument("--output_dir", default="win-rate", help="Folder for pictures, scores and the page.")
    return parser.parse_args(input_args)


def add_evaluation_arguments(parser):
    """The flags that say which prompts are drawn and how, and what scores the pictures."""
    add_prompt_arguments(parser)
    add_drawing_arguments(parser)
    number = "Pictures of each prompt. Intervals count them as one observation."
    parser.add_argument("--num_images_per_prompt", type=COUNT, default=1, help=number)
    add_scorer_arguments(parser)


def open_side(args, side):
    """A side's `Source`. Without a model of its own, the baseline has the other side's."""
    flags = SIDES[side]
    model, variant, revision, lora, unet = (getattr(args, flag) for flag in flags)
    if model in (None, args.pretrained_model_name_or_path):
        model = args.pretrained_model_name_or_path
        variant, revision = variant or args.variant, revision or args.revision
    return open_source(args, flags, model, variant, revision, lora, unet)


def describe_side(args, source, unet, lora):
    """
    What the pictures of a source depend on: settings, and digests of weights, by flag. `unet` and `lora` are the names that were
    given.
    """
    flags = source.flags
    settings = {
        flags.model: source.model,
        flags.variant: source.variant,
        flags.revision: source.revision,
        flags.unet: unet,
        flags.lora: lora,
        "scheduler": source.scheduler,
        **{name: getattr(args, name) for name in DRAWING_ARGUMENTS},
    }
    digests = {flags.model: source.model_digest(), flags.unet: source.unet_digest(), flags.lora: source.lora_digest()}
    return settings, digests


class Comparison(NamedTuple):
    """
    What one scorer says: both medians, the share of pictures that the model wins (a tie counts one half) with its 95 %
    confidence interval, clustered by prompt, and the two-sided p-value of the sign test of the prompts, which ignores ties.
    """

    median: float
    baseline_median: float
    win_rate: float
    low: float
    high: float
    p_value: float


def count_wins(scores, baseline_scores):
    """The share of each prompt's pictures that win, of shape `(prompts,)`. Scores are of shape `(prompts, pictures)`."""
    scores, baseline_scores = np.asarray(scores), np.asarray(baseline_scores)
    return ((scores > baseline_scores) + 0.5 * (scores == baseline_scores)).mean(axis=1)


def compare(scores, baseline_scores):
    """The `Comparison` of scores of shape `(prompts, pictures of a prompt)`."""
    from intervals import win_rate_interval
    from scipy.stats import binomtest

    wins = count_wins(scores, baseline_scores)
    p_value = binomtest(int((wins > 0.5).sum()), int((wins != 0.5).sum())).pvalue if (wins != 0.5).any() else 1.0
    return Comparison(np.median(scores), np.median(baseline_scores), *win_rate_interval(wins), p_value)


def write_csv(args, pictures, scores):
    with open(Path(args.output_dir) / "scores.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt", "seed", *(f"{name}_{side}" for name in scores for side in SIDES)])
        for number, picture in enumerate(pictures):
            values = [scores[name][side][number] for name in scores for side in SIDES]
            writer.writerow([number // args.num_images_per_prompt, picture.prompt, picture.seed, *values])


def summarize(prompts, pictures, comparisons, settings, scorers):
    """Markdown tables: each scorer's `Comparison`, where the scorers come from, and both sides' settings."""
    import torch
    import transformers

    lines = [
        f"| {len(prompts)} prompts | median, model | median, baseline | win rate | 95 % | sign test, p |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in comparisons.items():
        lines.append(
            f"| {name} | {c.median:.4g} | {c.baseline_median:.4g} | {c.win_rate:.1%} | {c.low:.1%} – {c.high:.1%} |"
            f" {c.p_value:.2g} |"
        )
    lines += ["", "| scorer | weights or file, and its version |", "|---|---|"]
    lines += [f"| {name} | {scorer.version} |" for name, scorer in scorers.items()]
    lines += ["", f"Scored with torch {torch.__version__} and transformers {transformers.__version__}."]
    lines += ["", "| drawn with | model | baseline |", "|---|---|---|"]
    for name, *values in zip(settings["model"], *(settings[side].values() for side in SIDES)):
        if name == "resolution":
            values = ["{} x {}".format(*load_picture(pictures[side][0].path).size) for side in SIDES]
        lines.append(f"| {name} | {values[0]} | {values[1]} |")
    return "\n".join(lines) + "\n"


def write_page(args, pictures, scores, comparisons):
    """Writes `index.html`."""
    replaced = {
        side: [value for value in (getattr(args, flags.unet), getattr(args, flags.lora)) if value is not None]
        for side, flags in SIDES.items()
    }
    sides = {side: name_source(pictures[side][0].source.model, " and ".join(replaced[side])) for side in SIDES}
    rows = [
        (
            picture.prompt,
            {side: f"{side}/{pictures[side][index].path.name}" for side in SIDES},
            {name: {side: values[side][index] for side in SIDES} for name, values in scores.items()},
        )
        for index, picture in enumerate(pictures["model"])
    ]
    page = describe_page(sides, comparisons, rows)
    (Path(args.output_dir) / "index.html").write_text(page, encoding="utf-8")


def main(args):
    from accelerate import Accelerator

    require_package("scipy")
    accelerator = Accelerator()
    args.mixed_precision = choose_precision(args, accelerator)
    prompts = load_prompts(args)
    sources = {side: open_side(args, side) for side in SIDES}
    with locked_folder(args.output_dir, accelerator.is_main_process):
        # A scorer that cannot be loaded is an error before anything is drawn. Scorers stay on the CPU until all is drawn.
        evaluate(args, accelerator, prompts, sources, load_scorers(args))
    accelerator.end_training()


def evaluate(args, accelerator, prompts, sources, scorers):
    settings = {}
    if accelerator.is_main_process:
        refuse_foreign(args.output_dir, f"*/{SETTINGS_NAME}", ["scores.csv", "summary.md", "index.html"])
        for side in SIDES:
            names = (getattr(args, getattr(SIDES[side], kind)) for kind in ("unet", "lora"))
            settings[side], weights = describe_side(args, sources[side], *names)
            save_settings(Path(args.output_dir) / side, settings[side], weights, prompts)
    folder = Path(args.output_dir)
    pictures = {side: list_pictures(args, folder / side, prompts, sources[side]) for side in SIDES}
    draw_pictures(args, accelerator, [*pictures["model"], *pictures["baseline"]])
    accelerator.wait_for_everyone()
    # Both sides have the same batches, so that equal pictures have equal scores.
    by_side = {
        side: score_pictures(
            accelerator,
            scorers,
            [picture.prompt for picture in of_side],
            [picture.path for picture in of_side],
            f"Scoring: {side}",
        )
        for side, of_side in pictures.items()
    }
    scores = {name: {side: by_side[side][name] for side in SIDES} for name in scorers}
    if accelerator.is_main_process:
        write_csv(args, pictures["model"], scores)
        comparisons = {
            name: compare(*(np.reshape(values[side], (len(prompts), -1)) for side in SIDES))
            for name, values in scores.items()
        }
        write_page(args, pictures, scores, comparisons)
        summary = summarize(prompts, pictures, comparisons, settings, scorers)
        (folder / "summary.md").write_text(summary, encoding="utf-8")
        print(summary)


if __name__ == "__main__":
    run(main, parse_args)
