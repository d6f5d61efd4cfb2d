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


"""How often pictures of one Stable Diffusion beat another's, drawn for the same prompts from the same noise.

    accelerate launch tools/eval_win_rate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --lora_weights ncp-dpo-sd15 --prompts_file PartiPrompts.tsv --prompt_column Prompt --scorers pickscore clipscore \
      --output_dir parti

holds a LoRA against its base model. `--baseline_model_name_or_path` and `--baseline_lora_weights` name another opponent; one of
another native resolution has the same noise only if `--resolution` is given. Writes all pictures, `scores.csv`, `summary.md`
and `index.html`, a page of both sides sorted by how much one won. Pictures that are there already are not drawn again: to
replace one side, remove its folder.
"""

import argparse
import csv
import html
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from pictures import (
    SCORERS,
    Picture,
    add_drawing_arguments,
    add_prompt_arguments,
    add_scorer_arguments,
    choose_precision,
    digest_of_files,
    draw_pictures,
    load_picture,
    load_prompts,
    open_source,
    save_settings,
    score_pictures,
)


# The flags of both sides' model, its variant and revision, and LoRA.
SIDES = {
    "model": ("pretrained_model_name_or_path", "variant", "revision", "lora_weights"),
    "baseline": ("baseline_model_name_or_path", "baseline_variant", "baseline_revision", "baseline_lora_weights"),
}
# What pictures depend on beside them and the scheduler.
DRAWING_ARGUMENTS = ("seed", "num_inference_steps", "guidance_scale", "resolution", "mixed_precision")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_argument_group("the two sides")
    models.add_argument("--pretrained_model_name_or_path", type=str, required=True)
    models.add_argument("--variant", type=str, default=None, help="Of the model's files, for example fp16.")
    models.add_argument("--revision", type=str, default=None, help="Of the model on the hub.")
    help = "A folder, .safetensors file or hub id, or several joined by +, which are all loaded: round-1+round-2."
    models.add_argument("--lora_weights", type=str, default=None, help=help)
    models.add_argument("--baseline_model_name_or_path", type=str, default=None, help="Default: the same model.")
    for name in ("variant", "revision"):
        models.add_argument(f"--baseline_{name}", type=str, default=None, help="Default: the same of the same model.")
    models.add_argument("--baseline_lora_weights", type=str, default=None, help="Default: none.")

    add_prompt_arguments(parser)
    add_drawing_arguments(parser)
    add_scorer_arguments(parser)
    parser.add_argument("--output_dir", type=str, default="win-rate")
    return parser.parse_args(input_args)


def open_side(args, side):
    """A side's `Source`; the baseline's model is the other's unless it is given."""
    model, variant, revision, lora = (getattr(args, flag) for flag in SIDES[side])
    if model in (None, args.pretrained_model_name_or_path):
        model = args.pretrained_model_name_or_path
        variant, revision = variant or args.variant, revision or args.revision
    model_flag, variant_flag, _, lora_flag = SIDES[side]
    return open_source(args, (model_flag, variant_flag, lora_flag), model, variant, revision, lora)


def describe_side(args, side, source):
    """What a side's pictures depend on: settings, and digests of weights, by flag."""
    named = dict(zip(SIDES[side], (*source[:3], getattr(args, SIDES[side][3]))))
    settings = {**named, "scheduler": source.scheduler, **{name: getattr(args, name) for name in DRAWING_ARGUMENTS}}
    weights = {
        SIDES[side][0]: digest_of_files(source.model),
        SIDES[side][3]: source.digest_of_loras(),
    }
    return settings, weights


def picture_path(args, side, index):
    return Path(args.output_dir) / side / f"{index:05}.png"


class Comparison(NamedTuple):
    """
    Of one scorer: both medians; the share of prompts that the model wins, ties counting half, with its 95 % confidence
    interval (Wilson 1927); and the two-sided p-value of the sign test, ties left out.
    """

    median: float
    baseline_median: float
    win_rate: float
    low: float
    high: float
    p_value: float


def compare(scores, baseline_scores):
    """The `Comparison` of two lists of scores of the same prompts."""
    n = len(scores)
    wins = sum(ours > theirs for ours, theirs in zip(scores, baseline_scores, strict=True))
    losses = sum(ours < theirs for ours, theirs in zip(scores, baseline_scores, strict=True))
    rate = (wins + 0.5 * (n - wins - losses)) / n
    z = statistics.NormalDist().inv_cdf(0.975)
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    decided = wins + losses
    tail = sum(math.comb(decided, k) for k in range(min(wins, losses) + 1)) / 2**decided
    medians = statistics.median(scores), statistics.median(baseline_scores)
    return Comparison(*medians, rate, center - half_width, center + half_width, min(1.0, 2 * tail))


def write_csv(args, prompts, scores):
    with open(Path(args.output_dir) / "scores.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt", *(f"{name}_{side}" for name in scores for side in SIDES)])
        for index, prompt in enumerate(prompts):
            writer.writerow([index, prompt, *(scores[name][side][index] for name in scores for side in SIDES)])


def summarize(args, prompts, scores, settings):
    """Two Markdown tables: of every scorer's `Comparison`, and of both sides' settings."""
    lines = [
        f"| {len(prompts)} prompts | median, model | median, baseline | win rate | 95 % | sign test, p |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in scores.items():
        c = compare(values["model"], values["baseline"])
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
    """`index.html`: both pictures of every prompt, where the model won by most first, in the eyes of the first scorer."""
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
        f"<p>Sorted by how much the model won, in the eyes of {name}</p>"
        f"<table><tr><th>prompt</th><th>model</th><th>baseline</th></tr>{''.join(rows)}</table>"
    )
    (Path(args.output_dir) / "index.html").write_text(page, encoding="utf-8")


def main(args):
    accelerator = Accelerator()
    args.mixed_precision = choose_precision(args, accelerator)
    prompts = load_prompts(args)
    sources = {side: open_side(args, side) for side in SIDES}
    # Whether they are there is known before anything is drawn; the accelerator is the pipelines' until all is.
    scorers = {name: SCORERS[name](args) for name in args.scorers}
    settings = {}
    if accelerator.is_main_process:
        for side in SIDES:
            settings[side], weights = describe_side(args, side, sources[side])
            save_settings(Path(args.output_dir) / side, settings[side], weights, prompts)
    paths = {side: [picture_path(args, side, index) for index in range(len(prompts))] for side in SIDES}
    drawing = args.num_inference_steps, args.guidance_scale
    pictures = [
        Picture(path, prompt, sources[side], args.seed + index, *drawing)
        for side in SIDES
        for index, (path, prompt) in enumerate(zip(paths[side], prompts))
    ]
    draw_pictures(args, accelerator, pictures)
    accelerator.wait_for_everyone()
    # Side by side in the same batches, pictures that are equal score equally.
    by_side = {side: score_pictures(accelerator, scorers, prompts, paths[side], f"Scoring: {side}") for side in SIDES}
    scores = {name: {side: by_side[side][name] for side in SIDES} for name in scorers}
    if accelerator.is_main_process:
        write_csv(args, prompts, scores)
        write_page(args, prompts, scores)
        summary = summarize(args, prompts, scores, settings)
        (Path(args.output_dir) / "summary.md").write_text(summary, encoding="utf-8")
        print(summary)
    accelerator.end_training()


if __name__ == "__main__":
    # A code page prints what it can.
    sys.stdout.reconfigure(errors="replace")
    main(parse_args())
