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

r"""Makes preference pairs from prompts: draws pictures, which models then judge or people rate.

    accelerate launch tools/collect_preferences.py draw --prompts_file prompts.txt --num_images 4 --output_dir drawn \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
    # Models choose the better picture:
    accelerate launch tools/collect_preferences.py judge --input_dir drawn --output_dir pairs
    # Models judge pairs that exist. Those on which they agree with the label are kept:
    accelerate launch tools/collect_preferences.py judge --dataset_name pick_a_pic --output_dir agreed
    # Or people choose it, on a page in their browser:
    python tools/collect_preferences.py rate --input_dir drawn --output_dir pairs

`draw` writes one PNG per picture, metadata.jsonl, which says how each is drawn, and settings.json. Pictures that are there are
not drawn again. More prompts or images may follow. Several `--pretrained_model_name_or_path` or `--lora_weights` take turns in
the pictures of a prompt. With several `--num_inference_steps` or `--guidance_scale`, each picture has one of them at random.
`judge` and `rate` read any folder of pictures whose metadata.jsonl gives their `file_name` and `prompt`. `judge` also reads pairs
that exist, as training does. Both write parquet files for `--dataset_name`, with further columns, which training ignores.
"""

import getpass
import itertools
import json
import logging
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
from common import (
    COUNT,
    NOT_NEGATIVE,
    ArgumentParser,
    add_command,
    iter_rows,
    locked_folder,
    number_type,
    read_metadata,
    require_empty,
    require_package,
    run,
    whole_file,
)
from datasets import Value
from picture_records import RECORD_NAME, read_pictures, write_pairs
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
from rating import CHOICES_NAME, Choices, Page, check_rated_folder, number_pairs, serve, write_choices
from scorers import add_scorer_arguments, load_scorers, score_pictures


# Older versions have no HTML component that calls functions.
GRADIO_VERSION = "6.31.0"
# The password is not a flag: flags are visible to all users of a machine.
PASSWORD_VARIABLE = "RATE_PASSWORD"
SHARE = number_type(float, "from 0 to 1", lambda value: 0 <= value <= 1)


def parse_args(input_args=None):
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(metavar="draw | judge | rate", required=True)

    command = add_command(commands, __doc__, "draw", "Draw pictures of prompts.")
    command.set_defaults(command=draw)
    add = command.add_argument
    add("--pretrained_model_name_or_path", nargs="+", required=True, help="One model, or several that take turns.")
    add("--variant", help="Variant of the models' files, for example fp16.")
    add("--revision", help="Revision of the models on the hub.")
    lora = "Folder, .safetensors file or hub id of a LoRA, or several that take turns. none is the model alone."
    add("--lora_weights", nargs="+", default=["none"], help=lora)
    at_least_two = number_type(int, "at least 2", lambda value: value >= 2)
    add("--num_images", type=at_least_two, default=4, help="Pictures of each prompt.")
    add_prompt_arguments(command)
    add_drawing_arguments(command, several=True)
    add("--output_dir", required=True, help="Folder for the pictures: a new one, or that of an earlier draw.")

    input_dir, output_dir = "Folder that draw wrote.", "Folder for the pairs."

    help = "Let models choose, of drawn pictures or of pairs that exist."
    command = add_command(commands, __doc__, "judge", help)
    # Training reads such a column. Judging writes one.
    command.set_defaults(command=judge, preference_probability_column=None)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--input_dir", help=input_dir)
    source.add_argument("--dataset_name", help="Hub id or local folder of preference pairs, which are judged.")
    source.add_argument("--train_data_dir", help="Folder of images with a metadata.jsonl of pairs, which are judged.")
    command.add_argument("--output_dir", required=True, help=output_dir)
    add_scorer_arguments(command)
    drawn = command.add_argument_group("drawn pictures (--input_dir)")
    pairs = "Every two pictures of a prompt, the best against the worst, or each against the next, as the first scorer"
    pairs += " ranks them. Pairs are kept if all scorers agree."
    drawn.add_argument("--pairs", choices=["all", "best_worst", "adjacent"], default="all", help=pairs)
    margin = drawn.add_mutually_exclusive_group()
    least = "Least difference of scores: one number for all scorers, or one for each in their order."
    margin.add_argument("--min_margin", type=NOT_NEGATIVE, nargs="+", default=[0.0], help=least)
    quantile = "Leave out this share of each scorer's smallest margins, from 0 to 1."
    margin.add_argument("--min_margin_quantile", type=SHARE, help=quantile)
    add = command.add_argument_group("pairs that exist (--dataset_name or --train_data_dir)").add_argument
    keep = "Keep the pairs on whose label all scorers agree, or more than half of them, or keep all pairs and ties and"
    keep += " only add columns."
    add("--keep", choices=["agree", "majority", "all"], default="agree", help=keep)
    relabel = "Take the scorers' label where all of them prefer the other image."
    add("--relabel", action="store_true", help=relabel)
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split_name", default="train", help="Split of the dataset.")
    add("--image_0_column", default="jpg_0", help="Column of the first image, bytes or image.")
    add("--image_1_column", default="jpg_1", help="Column of the second image.")
    add("--label_column", default="label_0", help="Column of 1 (the first image won), 0 (it lost) or 0.5 (a tie).")
    add("--caption_column", default="caption", help="Column of the prompt.")
    add("--max_train_samples", type=COUNT, help="Judge only the first so many pairs that have a winner.")
    add("--on_bad_sample", choices=["error", "skip"], default="error", help="What to do with unreadable pairs.")
    add("--cache_dir", help="Where downloaded datasets are stored.")

    help = "Let people choose, on a page in their browser."
    command = add_command(commands, __doc__, "rate", help)
    command.set_defaults(command=rate)
    add = command.add_argument
    add("--input_dir", required=True, help=input_dir)
    add("--output_dir", required=True, help=output_dir)
    add("--host", help="Address to listen on, such as 0.0.0.0. Default: only this machine can open the page.")
    password = f"Raters log in with it and a password, from the environment variable {PASSWORD_VARIABLE} or asked for."
    add("--username", help=password)
    return parser.parse_args(input_args)


# draw


def draw(args):
    from accelerate import Accelerator

    accelerator = Accelerator()
    args.mixed_precision = choose_precision(args, accelerator)
    prompts = load_prompts(args)
    sources = open_sources(args)
    if args.num_images < len(sources):
        raise ValueError(f"--num_images {args.num_images} is too few: {len(sources)} models and LoRAs take turns.")
    folder = Path(args.output_dir)
    pictures = plan_pictures(args, prompts, list(sources))
    with locked_folder(folder, accelerator.is_main_process):
        if accelerator.is_main_process:
            names = "pretrained_model_name_or_path variant revision lora_weights scheduler seed num_inference_steps"
            names = f"{names} guidance_scale resolution mixed_precision".split()
            weights = {
                "pretrained_model_name_or_path": [source.model_digest() for source in sources],
                "lora_weights": [source.lora_digest() for source in sources],
            }
            save_settings(folder, {name: getattr(args, name) for name in names}, weights, prompts)
            save_record(args, folder, pictures, sources)
        draw_pictures(args, accelerator, pictures)
        accelerator.wait_for_everyone()
    accelerator.print(f"{len(prompts):,} prompts, {len(pictures):,} pictures in {folder}")
    accelerator.end_training()


def open_sources(args):
    """The `Source`s that take turns, and for each its LoRA as it was given: `{source: LoRA}`."""
    models, loras = args.pretrained_model_name_or_path, args.lora_weights
    num_sources = max(len(models), len(loras))
    if {len(models), len(loras)} - {1, num_sources}:
        raise ValueError(
            f"--lora_weights has {len(loras)} values for {len(models)} of --pretrained_model_name_or_path. Give one for "
            "all or one for each; none is a model without a LoRA."
        )
    loras = [None if lora == "none" else lora for lora in loras * (num_sources // len(loras))]
    models = models * (num_sources // len(models))
    return {
        open_source(args, Flags(), model, args.variant, args.revision, lora): lora
        for model, lora in zip(models, loras)
    }


def plan_pictures(args, prompts, sources):
    """All pictures. Each has random numbers of its own, so that more prompts or images do not change it."""
    pictures = []
    for index, number in itertools.product(range(len(prompts)), range(args.num_images)):
        seed, *choices = np.random.SeedSequence([args.seed, index, number]).generate_state(3).tolist()
        steps, guidance = args.num_inference_steps, args.guidance_scale
        pictures.append(
            Picture(
                path=Path(args.output_dir, f"{index:05}-{number:02}.png"),
                prompt=prompts[index],
                source=sources[number % len(sources)],
                seed=seed,
                num_inference_steps=steps[choices[0] % len(steps)],
                guidance_scale=guidance[choices[1] % len(guidance)],
            )
        )
    return pictures


def save_record(args, folder, pictures, loras):
    """Writes metadata.jsonl, which says how each picture is drawn. Pictures of earlier runs stay in it."""
    file = folder / RECORD_NAME
    before = iter_rows(read_metadata(str(file))) if file.is_file() else ()
    record = {row["file_name"]: row for row in before if (folder / row["file_name"]).is_file()}
    digests = {source: source.lora_digest() for source in loras}
    for path, prompt, source, seed, num_inference_steps, guidance_scale in pictures:
        record[path.name] = {
            "file_name": path.name,
            "prompt": prompt,
            "model": source.model,
            "variant": source.variant,
            "revision": source.revision,
            "lora_weights": loras[source],
            "lora_digest": digests[source],
            "scheduler": source.scheduler,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "resolution": args.resolution,
            "mixed_precision": args.mixed_precision,
        }
    with whole_file(file) as incomplete:
        incomplete.write_text("".join(json.dumps(record[name]) + "\n" for name in sorted(record)), encoding="utf-8")


# judge


def judge(args):
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    args.scorers = list(dict.fromkeys(args.scorers))
    check_judge_arguments(args)
    # The first process to finish waits for the others. The default limit is some minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(kwargs_handlers=[patience])
    if args.input_dir is None:
        from judging import judge_pairs

        judge_pairs(args, accelerator)
    else:
        judge_pictures(args, accelerator)
    accelerator.end_training()


def check_judge_arguments(args):
    """Raises a `ValueError` for flags that do not go together."""
    if args.input_dir is None:
        for name, default in {"pairs": "all", "min_margin": [0.0], "min_margin_quantile": None}.items():
            if getattr(args, name) != default:
                raise ValueError(f"--{name} is for drawn pictures (--input_dir). Pairs that exist have --keep.")
    elif args.keep != "agree" or args.relabel:
        raise ValueError("--keep and --relabel are for pairs that exist (--dataset_name or --train_data_dir).")
    elif len(args.min_margin) not in (1, len(args.scorers)):
        raise ValueError(f"--min_margin has {len(args.min_margin)} values for {len(args.scorers)} --scorers.")


def judge_pictures(args, accelerator):
    from judging import choose_pairs

    folder = Path(args.output_dir)
    require_empty(folder)
    with locked_folder(folder, accelerator.is_main_process):
        prompts = read_pictures(args.input_dir)
        pictures = [picture for rows in prompts.values() for picture in rows]
        scorers = load_scorers(args)
        paths, captions = ([picture[key] for picture in pictures] for key in ("path", "prompt"))
        scores = score_pictures(accelerator, scorers, captions, paths)
        if accelerator.is_main_process:
            for picture, *values in zip(pictures, *scores.values()):
                picture["scores"] = values
            versions = ", ".join(f"{name}: {scorer.version}" for name, scorer in scorers.items())
            pairs, report = choose_pairs(args, list(scorers), prompts, versions)
            columns = {f"{name}_{side}": Value("float64") for name in scorers for side in (0, 1)}
            columns = {"probability_0": Value("float64"), "scorers": Value("string"), **columns}
            if warning := write_pairs(folder, pairs, columns):
                report = f"{report}\nWarning: {warning}\n"
            (folder / "report.md").write_text(report, encoding="utf-8")
            print(report)


# rate


def rate(args):
    require_package("gradio", GRADIO_VERSION)
    folder, login = Path(args.output_dir), read_login(args)
    check_rated_folder(folder)
    with locked_folder(folder), tempfile.TemporaryDirectory() as served:
        choices = Choices(folder / CHOICES_NAME, number_pairs(read_pictures(args.input_dir)))
        serve(Page(choices, Path(served)), args.host, login)
        write_choices(folder, choices)


def read_login(args):
    """The name and password that raters log in with, or `None` without `--host`."""
    if args.host is None:
        if args.username is not None:
            raise ValueError("--username needs --host. Without it, only this machine can open the page.")
        return None
    if not args.username:
        raise ValueError(f"--host {args.host} lets others in. Give --username, which they log in with.")
    password = os.environ.get(PASSWORD_VARIABLE)
    if password is None and sys.stdin is not None and sys.stdin.isatty():
        password = getpass.getpass(f"Password for {args.username}: ")
    if not password:
        raise ValueError(f"--host {args.host} lets others in. Set a password in {PASSWORD_VARIABLE}.")
    return args.username, password


def main(args):
    args.command(args)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    run(main, parse_args)
