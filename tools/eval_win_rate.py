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

"""Compares two Stable Diffusion models: how often one's pictures score higher, for the same prompts from the same noise.

    accelerate launch tools/eval_win_rate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --lora_weights ncp-dpo-sd15 --prompts_file PartiPrompts.tsv --prompt_column Prompt --scorers pickscore clipscore \
      --output_dir parti

compares a LoRA with its base model. `--baseline_model_name_or_path` and `--baseline_lora_weights` name another opponent. If the
native resolutions differ, give `--resolution`: without it the noise differs too. The output folder gets all pictures,
`scores.csv`, `summary.md` and `index.html`, a page of both sides sorted by how much one won. Pictures that are there already
are not drawn again. To draw one side again, remove its folder.
"""

import argparse
import csv
import html
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from common import locked_folder
from intervals import win_rate_interval
from picture_records import load_picture
from pictures import (
    Flags,
    Picture,
    add_drawing_arguments,
    add_prompt_arguments,
    choose_precision,
    draw_pictures,
    load_prompts,
    open_source,
    save_settings,
)
from scipy.stats import binomtest
from scorers import add_scorer_arguments, load_scorers, score_pictures


# The flags that give the model of each side.
SIDES = {
    "model": Flags(),
    "baseline": Flags("baseline_model_name_or_path", "baseline_variant", "baseline_revision", "baseline_lora_weights"),
}
# What pictures depend on beside the model and the scheduler.
DRAWING_ARGUMENTS = ("seed", "num_inference_steps", "guidance_scale", "resolution", "mixed_precision")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the two sides").add_argument
    add("--pretrained_model_name_or_path", required=True)
    add("--variant", help="Variant of the model's files, for example fp16.")
    add("--revision", help="Revision of the model on the hub.")
    add("--lora_weights", help="Folder, .safetensors file or hub id of a LoRA. Default: none.")
    add("--baseline_model_name_or_path", help="Default: the same model.")
    add("--baseline_variant", help="Default: --variant if the model is the same.")
    add("--baseline_revision", help="Default: --revision if the model is the same.")
    add("--baseline_lora_weights", help="Default: none.")
    add_prompt_arguments(parser)
    add_drawing_arguments(parser)
    add_scorer_arguments(parser)
    parser.add_argument("--output_dir", default="win-rate")
    return parser.parse_args(input_args)


def open_side(args, side):
    """A side's `Source`. Without a model of its own, the baseline has the other side's."""
    flags = SIDES[side]
    model, variant, revision, lora = (getattr(args, flag) for flag in flags)
    if model in (None, args.pretrained_model_name_or_path):
        model = args.pretrained_model_name_or_path
        variant, revision = variant or args.variant, revision or args.revision
    return open_source(args, flags, model, variant, revision, lora)


def describe_side(args, side, source):
    """What a side's pictures depend on: settings, and digests of weights, by flag."""
    flags = SIDES[side]
    settings = {
        flags.model: source.model,
        flags.variant: source.variant,
        flags.revision: source.revision,
        flags.lora: getattr(args, flags.lora),
        "scheduler": source.scheduler,
        **{name: getattr(args, name) for name in DRAWING_ARGUMENTS},
    }
    return settings, {flags.model: source.model_digest(), flags.lora: source.lora_digest()}


def picture_path(args, side, index):
    return Path(args.output_dir) / side / f"{index:05}.png"


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
    wins = count_wins(scores, baseline_scores)
    p_value = binomtest(int((wins > 0.5).sum()), int((wins != 0.5).sum())).pvalue if (wins != 0.5).any() else 1.0
    return Comparison(np.median(scores), np.median(baseline_scores), *win_rate_interval(wins), p_value)


def write_csv(args, prompts, scores):
    with open(Path(args.output_dir) / "scores.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt", *(f"{name}_{side}" for name in scores for side in SIDES)])
        for index, prompt in enumerate(prompts):
            writer.writerow([index, prompt, *(scores[name][side][index] for name in scores for side in SIDES)])


def summarize(args, prompts, scores, settings):
    """Two Markdown tables: each scorer's `Comparison`, and both sides' settings."""
    lines = [
        f"| {len(prompts)} prompts | median, model | median, baseline | win rate | 95 % | sign test, p |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in scores.items():
        c = compare(*(np.reshape(values[side], (len(prompts), -1)) for side in SIDES))
        lines.append(
            f"| {name} | {c.median:.4g} | {c.baseline_median:.4g} | {c.win_rate:.1%} | {c.low:.1%} – {c.high:.1%} |"
            f" {c.p_value:.2g} |"
        )
    lines += ["", "| drawn with | model | baseline |", "|---|---|---|"]
    for name, *values in zip(settings["model"], *(settings[side].values() for side in SIDES)):
        if name == "resolution":
            values = ["{} x {}".format(*load_picture(picture_path(args, side, 0)).size) for side in SIDES]
        lines.append(f"| {name} | {values[0]} | {values[1]} |")
    return "\n".join(lines) + "\n"


def write_page(args, prompts, scores):
    """`index.html`: both pictures of every prompt, sorted by how much the model won according to the first scorer."""
    name, values = next(iter(scores.items()))
    margins = [ours - theirs for ours, theirs in zip(values["model"], values["baseline"])]
    rows = []
    for index in sorted(range(len(prompts)), key=lambda index: -margins[index]):
        cells = "".join(
            f'<td><img src="{side}/{index:05}.png" loading="lazy"><br>'
            + ", ".join(f"{scorer} {scores[scorer][side][index]:.4g}" for scorer in scores)
            + "</td>"
            for side in SIDES
        )
        rows.append(f"<tr><td>{html.escape(prompts[index])}<br>{margins[index]:+.4g}</td>{cells}</tr>")
    page = (
        '<!doctype html><meta charset="utf-8"><title>Win rate</title>'
        "<style>body{font-family:sans-serif}img{max-width:384px}td{vertical-align:top;padding:6px}</style>"
        f"<p>Sorted by how much the model won according to {name}</p>"
        f"<table><tr><th>prompt</th><th>model</th><th>baseline</th></tr>{''.join(rows)}</table>"
    )
    (Path(args.output_dir) / "index.html").write_text(page, encoding="utf-8")


def main(args):
    accelerator = Accelerator()
    args.mixed_precision = choose_precision(args, accelerator)
    prompts = load_prompts(args)
    sources = {side: open_side(args, side) for side in SIDES}
    with locked_folder(args.output_dir, accelerator.is_main_process):
        # A scorer that cannot be loaded is an error before anything is drawn. Scorers stay on the CPU until all is drawn.
        scorers = load_scorers(args)
        evaluate(args, accelerator, prompts, sources, scorers)
    accelerator.end_training()


def evaluate(args, accelerator, prompts, sources, scorers):
    settings = {}
    if accelerator.is_main_process:
        for side in SIDES:
            settings[side], weights = describe_side(args, side, sources[side])
            save_settings(Path(args.output_dir) / side, settings[side], weights, prompts)
    paths = {side: [picture_path(args, side, index) for index in range(len(prompts))] for side in SIDES}
    pictures = [
        Picture(path, prompt, sources[side], args.seed + index, args.num_inference_steps, args.guidance_scale)
        for side in SIDES
        for index, (path, prompt) in enumerate(zip(paths[side], prompts))
    ]
    draw_pictures(args, accelerator, pictures)
    accelerator.wait_for_everyone()
    # Both sides have the same batches, so that equal pictures have equal scores.
    by_side = {side: score_pictures(accelerator, scorers, prompts, paths[side], f"Scoring: {side}") for side in SIDES}
    scores = {name: {side: by_side[side][name] for side in SIDES} for name in scorers}
    if accelerator.is_main_process:
        write_csv(args, prompts, scores)
        write_page(args, prompts, scores)
        summary = summarize(args, prompts, scores, settings)
        (Path(args.output_dir) / "summary.md").write_text(summary, encoding="utf-8")
        print(summary)


if __name__ == "__main__":
    # Characters that the console's code page lacks are replaced.
    sys.stdout.reconfigure(errors="replace")
    main(parse_args())
