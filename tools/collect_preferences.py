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

"""From prompts to preference pairs: draws pictures, which models judge or people rate, for the trainers.

    accelerate launch tools/collect_preferences.py draw --prompts_file prompts.txt --num_images 4 --output_dir drawn \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
    accelerate launch tools/collect_preferences.py judge --input_dir drawn --output_dir pairs    # models choose, or
    python tools/collect_preferences.py rate --input_dir drawn --output_dir pairs                # people do, on a page

`draw` writes a PNG per picture, metadata.jsonl, which says how each is drawn, and settings.json. Pictures that are there are not
drawn again, and more prompts or images may follow. With several `--pretrained_model_name_or_path` or `--lora_weights` they take
turns in the pictures of a prompt, and with several `--num_inference_steps` or `--guidance_scale` each picture has one at random.
`judge` and `rate` take every folder of pictures whose metadata.jsonl gives their `file_name` and `prompt`. Both write parquet
files for `--dataset_name`, with how each picture was drawn in columns that training ignores.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import random
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from datasets import Features, Value
from packaging.version import Version
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
    number_argument,
    open_source,
    save_settings,
    score_pictures,
)
from prepare_preferences import SCHEMA, iter_rows, name_source, pair_ranks, read_metadata, source_warning, write_shards
from tqdm.auto import tqdm


logger = logging.getLogger("collect_preferences")

RECORD_NAME = "metadata.jsonl"
CHOICES_NAME = "choices.jsonl"
# How a picture was drawn, with a _0 or _1 behind it in the pairs.
PROVENANCE = {
    **dict.fromkeys("file_name model variant revision lora_weights lora_digest scheduler".split(), Value("string")),
    **dict.fromkeys("seed num_inference_steps resolution".split(), Value("int64")),
    "guidance_scale": Value("float64"),
    "mixed_precision": Value("string"),
}
SHARD_BYTES = 500 << 20
# A scorer's margins become logits of the probability to win (Bradley and Terry 1952): as they are, but for a plain cosine.
LOGITS = {"hpsv2": 100}
# The page is an HTML component that calls functions, which older ones do not have.
GRADIO_VERSION = "6.31.0"
# Seconds after which a rater's name is free again, of whose page nothing was heard.
LEASE = 15


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="draw | judge | rate", required=True)

    command = commands.add_parser("draw", help="Draw pictures of prompts.")
    command.set_defaults(command=draw)
    add = command.add_argument
    add("--pretrained_model_name_or_path", nargs="+", required=True, help="One, or several that take turns.")
    add("--variant", default=None, help="Of the models' files, for example fp16.")
    add("--revision", default=None, help="Of the models on the hub.")
    help = "A folder, .safetensors file or hub id: one, or several that take turns; none is the model alone, and a+b loads both."
    add("--lora_weights", nargs="+", default=["none"], help=help)
    add("--num_images", type=number_argument(int, 2), default=4, help="Of every prompt. Default: %(default)s.")
    add_prompt_arguments(command)
    add_drawing_arguments(command, several=True)
    add("--output_dir", required=True)

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--input_dir", required=True, help="What draw wrote.")
    source.add_argument("--output_dir", required=True, help="Folder for the pairs.")

    command = commands.add_parser("judge", parents=[source], help="Let models choose.")
    command.set_defaults(command=judge)
    add = command.add_argument
    help = "Every two pictures of a prompt (default), or, by the first scorer, the best against the worst or each against "
    help += "the next; then only those on which all scorers agree."
    add("--pairs", choices=["all", "best_worst", "adjacent"], default="all", help=help)
    margin = command.add_mutually_exclusive_group()
    help = "Difference of scores that a pair must have: one number for all scorers, or one for each, in their order."
    margin.add_argument("--min_margin", type=number_argument(float, 0), nargs="+", default=[0.0], help=help)
    help = "Leave out the pairs in this share of the smallest margins of any scorer, from 0 to 1."
    margin.add_argument("--min_margin_quantile", type=share_argument, default=None, help=help)
    add_scorer_arguments(command)

    command = commands.add_parser("rate", parents=[source], help="Let people choose, on a page in their browser.")
    command.set_defaults(command=rate)
    add = command.add_argument
    add("--host", default=None, help="Address to listen on, such as 0.0.0.0. Default: this machine alone.")
    add("--username", default=None, help="For --host: what raters log in with.")
    add("--password", default=None)
    return parser.parse_args(input_args)


def share_argument(text):
    """A `type` for argparse: a share from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return float(text)


# draw


def draw(args):
    accelerator = Accelerator()
    args.mixed_precision = choose_precision(args, accelerator)
    prompts = load_prompts(args)
    sources = open_sources(args)
    if args.num_images < len(sources):
        raise ValueError(
            f"--num_images {args.num_images} is too few for {len(sources)} models and LoRAs to take turns."
        )
    folder = Path(args.output_dir)
    pictures = plan_pictures(args, prompts, list(sources))
    if accelerator.is_main_process:
        names = "pretrained_model_name_or_path variant revision lora_weights scheduler seed num_inference_steps"
        names = f"{names} guidance_scale resolution mixed_precision".split()
        digests = {source: source.digest_of_loras() for source in sources}
        models = [digest_of_files(source.model) for source in sources]
        weights = {"pretrained_model_name_or_path": models, "lora_weights": list(digests.values())}
        save_settings(folder, {name: getattr(args, name) for name in names}, weights, prompts)
        save_record(args, folder, pictures, sources, digests)
    draw_pictures(args, accelerator, pictures)
    accelerator.wait_for_everyone()
    accelerator.print(f"{len(prompts):,} prompts, {len(pictures):,} pictures in {folder}")
    accelerator.end_training()


def open_sources(args):
    """The `Source`s that take turns, each with its LoRA as it was given: one of models and LoRAs, or as many of both."""
    models, loras = args.pretrained_model_name_or_path, args.lora_weights
    number = max(len(models), len(loras))
    if {len(models), len(loras)} - {1, number}:
        raise ValueError(
            f"--lora_weights gives {len(loras)} for {len(models)} of --pretrained_model_name_or_path: give one for all or "
            "one for each, none where a model draws alone."
        )
    flags = ("pretrained_model_name_or_path", "variant", "lora_weights")
    loras = [None if lora == "none" else lora for lora in loras * (number // len(loras))]
    pairs = zip(models * (number // len(models)), loras)
    return {open_source(args, flags, model, args.variant, args.revision, lora): lora for model, lora in pairs}


def plan_pictures(args, prompts, sources):
    """All pictures; what is random about one is its own, so that more prompts or images change nothing about it."""
    pictures = []
    for index, number in itertools.product(range(len(prompts)), range(args.num_images)):
        seed, *chosen = np.random.SeedSequence([args.seed, index, number]).generate_state(3).tolist()
        path = Path(args.output_dir, f"{index:05}-{number:02}.png")
        sets = zip((args.num_inference_steps, args.guidance_scale), chosen)
        drawing = (values[place % len(values)] for values, place in sets)
        pictures.append(Picture(path, prompts[index], sources[number % len(sources)], seed, *drawing))
    return pictures


def save_record(args, folder, pictures, loras, digests):
    """Writes how each picture is drawn, one in a line, those of earlier runs included."""
    file = folder / RECORD_NAME
    before = iter_rows(read_metadata(str(file))) if file.is_file() else ()
    record = {row["file_name"]: row for row in before if (folder / row["file_name"]).is_file()}
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
    incomplete = file.with_suffix(".incomplete")
    lines = "".join(json.dumps(record[name]) + "\n" for name in sorted(record))
    incomplete.write_text(lines, encoding="utf-8")
    os.replace(incomplete, file)


# Pictures and pairs


def read_pictures(input_dir):
    """
    The pictures of every prompt that has two or more, `{prompt: [row of the record, with its path]}`; those that are not there
    are left out and counted.
    """
    file = Path(input_dir, RECORD_NAME)
    if not file.is_file():
        raise ValueError(f"--input_dir {input_dir} holds no {RECORD_NAME}. Give the folder that draw wrote.")
    prompts, missing = defaultdict(dict), []
    for number, row in enumerate(iter_rows(read_metadata(str(file)))):
        for name in ("file_name", "prompt"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{file}, picture {number}: {name} is {row.get(name)!r:.80}, but must be a text.")
        row["path"] = Path(input_dir, row["file_name"])
        if row["path"].is_file():
            prompts[row["prompt"]][row["file_name"]] = row
        else:
            missing.append(row["file_name"])
    if missing:
        logger.warning(f"{len(missing)} pictures in {file} are not there and left out, the first {missing[0]}")
    if alone := [prompt for prompt, rows in prompts.items() if len(rows) == 1]:
        logger.warning(f"{len(alone)} prompts have one picture only and are left out, the first {alone[0]!r:.80}")
    prompts = {prompt: list(rows.values()) for prompt, rows in prompts.items() if len(rows) > 1}
    if not prompts:
        raise ValueError(f"--input_dir {input_dir} holds no two pictures of a prompt. Draw them first.")
    return prompts


def write_pairs(output_dir, pairs, features):
    """
    Writes the parquet files of pairs, `(picture 0, picture 1, the other columns)`, in the trainers' schema, with how their
    pictures were drawn. Warns if winners and losers differ by their source.
    """
    provenance = {f"{name}_{side}": kind for side in (0, 1) for name, kind in PROVENANCE.items()}
    sources = [
        [name_source(picture.get("model"), picture.get("lora_weights")) for picture in pair[:2]] for pair in pairs
    ]
    decided = [
        source if row["label_0"] == 1 else source[::-1]
        for source, (_, _, row) in zip(sources, pairs)
        if row["label_0"] != 0.5
    ]
    if warning := source_warning(decided):
        logger.warning(warning)

    def rows():
        for *pictures, row in tqdm(pairs, unit=" pairs", desc="Writing"):
            row = {**row, "caption": pictures[0]["prompt"]}
            for side, picture in enumerate(pictures):
                row[f"jpg_{side}"] = {"bytes": picture["path"].read_bytes(), "path": None}
                row |= {f"{name}_{side}": picture.get(name) for name in PROVENANCE}
            yield row

    try:
        write_shards(rows(), Features({**SCHEMA, **features, **provenance}), output_dir, SHARD_BYTES)
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} cannot be written, and holds no pairs: {error}") from error
    return warning


# judge


def judge(args):
    accelerator = Accelerator()
    args.scorers = list(dict.fromkeys(args.scorers))
    if len(args.min_margin) not in (1, len(args.scorers)):
        raise ValueError(
            f"--min_margin has {len(args.min_margin)} values for {len(args.scorers)} --scorers: give one each."
        )
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        raise ValueError(f"--output_dir {args.output_dir} is not empty. Give a new folder.")
    prompts = read_pictures(args.input_dir)
    pictures = [picture for rows in prompts.values() for picture in rows]
    scorers = {name: SCORERS[name](args) for name in args.scorers}
    paths, captions = ([picture[key] for picture in pictures] for key in ("path", "prompt"))
    scores = score_pictures(accelerator, scorers, captions, paths)
    if accelerator.is_main_process:
        for picture, *values in zip(pictures, *scores.values()):
            picture["scores"] = values
        versions = ", ".join(f"{name}: {scorer.version}" for name, scorer in scorers.items())
        pairs, report = choose_pairs(args, prompts, versions)
        columns = {f"{name}_{side}": Value("float64") for name in scorers for side in (0, 1)}
        columns = {"probability_0": Value("float64"), "scorers": Value("string"), **columns}
        if warning := write_pairs(args.output_dir, pairs, columns):
            report = f"{report}\nWarning: {warning}\n"
        Path(args.output_dir, "report.md").write_text(report, encoding="utf-8")
        print(report)
    accelerator.end_training()


def choose_pairs(args, prompts, versions):
    """The pairs on which all scorers agree by a large enough margin, as `write_pairs` takes them, and a report."""
    candidates = []
    for rows in prompts.values():
        ranked = pair_ranks([picture["scores"][0] for picture in rows], args.pairs, higher_is_better=True)
        candidates += [(rows[first], rows[second]) for first, second in sorted(map(sorted, ranked))]
    names = args.scorers
    scores = np.array([[first["scores"], second["scores"]] for first, second in candidates]).reshape(-1, 2, len(names))
    margins = scores[:, 0] - scores[:, 1]
    agree = (margins > 0).all(axis=1) | (margins < 0).all(axis=1)
    least = np.broadcast_to(args.min_margin, len(names))
    if args.min_margin_quantile is not None and len(margins):
        least = np.quantile(abs(margins), args.min_margin_quantile, axis=0)
    wide = (abs(margins) >= least).all(axis=1)
    kept = np.flatnonzero(agree & wide)
    counts = f"{len(agree):,} pairs ({args.pairs}), scorers agree on {agree.sum():,}, {wide.sum():,} are wide enough"
    if not len(kept):
        raise ValueError(f"No pair is left: of {counts} (--min_margin). None is both.")
    logits = margins * [LOGITS.get(name, 1) for name in names]
    probabilities = (1 / (1 + np.exp(-logits))).mean(axis=1)

    pairs = []
    for index in kept:
        columns = {"label_0": float(margins[index, 0] > 0), "probability_0": probabilities[index], "scorers": versions}
        columns |= {f"{name}_{side}": scores[index, side, k] for k, name in enumerate(names) for side in (0, 1)}
        pairs.append((*candidates[index], columns))
    lines = [f"{len(prompts):,} prompts: {counts}, {len(kept):,} are both and kept.", "", f"Scorers: {versions}", ""]
    lines += ["| agree | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    signs = np.sign(margins)
    for k, name in enumerate(names):
        shares = (signs == signs[:, [k]]).mean(axis=0)
        lines.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    for k, name in enumerate(names):
        lines += ["", f"| margin of {name} | pairs | kept |", "|---|---|---|"]
        edges = np.histogram_bin_edges(abs(margins[:, k]))
        histograms = (np.histogram(abs(margins[rows, k]), edges)[0] for rows in (slice(None), kept))
        bins = zip(edges, edges[1:], *histograms)
        lines += [f"| {low:.4g} - {high:.4g} | {n:,} | {num_kept:,} |" for low, high, n, num_kept in bins]
    return pairs, "\n".join(lines) + "\n"


# rate


def rate(args):
    try:
        installed = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        installed = "0"
    if Version(installed) < Version(GRADIO_VERSION):
        raise ImportError(f'To rate on a page, please install Gradio: `pip install "gradio>={GRADIO_VERSION}"`.')
    if args.host is not None and not (args.username and args.password):
        raise ValueError(f"--host {args.host} lets others in. Give --username and --password, which they log in with.")
    if args.host is None and (args.username or args.password):
        raise ValueError("--username and --password are for --host; without it the page is for this machine alone.")
    folder = Path(args.output_dir)
    pairs = number_pairs(read_pictures(args.input_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(folder / ".lock", timeout=0))
        except filelock.Timeout:
            raise ValueError(f"--output_dir {folder} is being written by another rate. Stop it first.") from None
        choices = Choices(folder / CHOICES_NAME, pairs)
        served = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        serve(args, Page(choices, served), served)
        write_choices(folder, choices)


def number_pairs(prompts):
    """
    Every two pictures of every prompt by a name that their content decides, `{name: (picture, picture)}`: one pair of each
    prompt, then the next of each, so that whoever stops early has seen all prompts.
    """
    rounds = []
    for prompt, rows in tqdm(prompts.items(), desc="Reading pictures"):
        for picture in rows:
            load_picture(picture["path"])
            picture["digest"] = hashlib.sha256(picture["path"].read_bytes()).hexdigest()
        pairs = list(itertools.combinations(rows, 2))
        random.Random(prompt).shuffle(pairs)
        rounds.append(pairs)
    named = {}
    for pair in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*rounds))):
        content = [pair[0]["prompt"], *(picture["digest"] for picture in pair)]
        named[hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]] = pair
    return named


class Choices:
    """What raters chose, `by_rater[rater][pair]`, in order; each choice is a line of a file that is only appended to."""

    LABELS = {"picture_0": 1.0, "picture_1": 0.0, "tie": 0.5, "skip": None}

    def __init__(self, path, pairs):
        self.path, self.pairs, self.by_rater, self.seconds = path, pairs, defaultdict(dict), defaultdict(list)
        path.touch()
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:
            logger.warning(f"{path} ends in half a line, from a crash while it was written, which is removed")
            os.truncate(path, path.stat().st_size - len(lines[-1]))
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                if entry["pair"] not in pairs:
                    raise ValueError(
                        "its pictures are not, or no longer, in --input_dir. Or give another --output_dir"
                    )
                self.apply(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error

    def apply(self, entry):
        if entry["choice"] == "undo":
            del self.by_rater[entry["rater"]][entry["pair"]]
        else:
            self.by_rater[entry["rater"]][entry["pair"]] = self.LABELS[entry["choice"]]
            self.seconds[entry["rater"]].append(entry["seconds"])

    def add(self, **entry):
        """Keeps a choice and returns when it is on the disk; an `OSError` if it cannot be, and then nothing of it is."""
        entry["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, size)
            raise
        self.apply(entry)


class Page:
    """What raters see and do; `served` is the folder of pictures that their browsers may read, under random names."""

    def __init__(self, choices, served):
        self.choices, self.served, self.lock = choices, served, threading.Lock()
        self.names, self.active, self.shown = {}, {}, {}

    def act(self, data):
        """What a rater's page shall show after an `action` of his: start, ping, left, right, tie, skip or undo."""
        with self.lock:
            return self.answer(" ".join(str(data["rater"]).split())[:50], data["tab"], data["action"], data["pair"])

    def answer(self, rater, tab, action, pair):
        if not rater:
            return {"error": "Please give your name."}
        now = time.monotonic()
        holder, heard = self.active.get(rater, (tab, now))
        if holder != tab and now - heard < LEASE:
            return {"error": f"{rater} is rating in another window. Close it, wait {LEASE} s, or give another name."}
        self.active[rater] = tab, now
        if action == "ping":
            return {}
        chosen, sides = self.choices.by_rater.get(rater), {"left": 0, "right": 1}
        try:
            # A key that was pressed twice, or an old page, is about another pair than that which is next.
            if action in ("left", "right", "tie", "skip") and [pair] == self.next_pairs(rater, 1):
                left = self.left(rater, pair)
                choice = f"picture_{sides[action] ^ left}" if action in sides else action
                seconds = round(now - self.shown.get(rater, now), 1)
                self.choices.add(
                    rater=rater, **self.describe(pair), left=f"picture_{left}", choice=choice, seconds=seconds
                )
            elif action == "undo" and chosen:
                self.choices.add(rater=rater, **self.describe(list(chosen)[-1]), choice="undo")
        except OSError as error:
            return {"error": f"Not saved: {error}. Choose again when there is room."}
        self.shown[rater] = time.monotonic()
        try:
            return self.show(rater)
        except OSError as error:
            return {"error": f"The next pair cannot be shown: {error}. What was chosen is saved."}

    def next_pairs(self, rater, number):
        chosen = self.choices.by_rater.get(rater, ())
        return list(itertools.islice((pair for pair in self.choices.pairs if pair not in chosen), number))

    def left(self, rater, pair):
        """Which of a pair's pictures is on the left: by chance, the same again after a reload."""
        return random.Random(f"{rater} {pair}").randrange(2)

    def describe(self, pair):
        first, second = self.choices.pairs[pair]
        names = {"picture_0": first["file_name"], "picture_1": second["file_name"]}
        return {"pair": pair, "prompt": first["prompt"], **names}

    def show(self, rater):
        total, done = len(self.choices.pairs), len(self.choices.by_rater.get(rater, ()))
        status = f"{done:,} of {total:,}"
        recent = self.choices.seconds[rater][-50:]
        if recent and done < total:
            status += f", about {max(1, round((total - done) * statistics.median(recent) / 60))} min left"
        state = {"rater": rater, "done": done, "total": total, "status": status, "pair": None, "pictures": []}
        urls = []
        for pair in self.next_pairs(rater, 2):
            pictures = self.choices.pairs[pair]
            left = self.left(rater, pair)
            urls.append([self.url(pictures[left]), self.url(pictures[1 - left])])
            if len(urls) == 1:
                state.update(pair=pair, prompt=pictures[0]["prompt"], pictures=urls[0])
        return {**state, "ahead": list(itertools.chain.from_iterable(urls[1:]))}

    def url(self, picture):
        """The address of a picture, whose name says nothing of it."""
        path = picture["path"]
        if path not in self.names:
            self.names[path] = self.served / f"{secrets.token_hex(16)}{path.suffix}"
            shutil.copyfile(path, self.names[path])
        return f"gradio_api/file={self.names[path].as_posix()}"


def serve(args, page, served):
    """Shows the page until it is interrupted, from the keyboard or by a signal to end."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    def act(data):
        return page.act(data)

    # The default theme's fonts come from another server.
    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")
    with gradio.Blocks(title="Which is better?", analytics_enabled=False) as blocks:
        gradio.HTML(
            html_template=HTML, css_template=CSS, js_on_load=JS, apply_default_css=False, server_functions=[act]
        )

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        blocks.launch(
            server_name=args.host or "127.0.0.1",
            auth=(args.username, args.password) if args.host else None,
            allowed_paths=[str(served)],
            theme=theme,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"Rate on {blocks.local_url} and end with Ctrl+C, which writes the pairs.", flush=True)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        blocks.close()


def write_choices(folder, choices):
    """Writes the pairs that raters chose and says how far they agree."""
    votes = defaultdict(dict)
    for rater, chosen in choices.by_rater.items():
        for pair, label in chosen.items():
            if label is not None:
                votes[pair][rater] = label
    pairs = []
    for pair, labels in votes.items():
        share = statistics.mean(labels.values())
        columns = {"label_0": 0.5 if share == 0.5 else float(share > 0.5), "probability_0": share}
        pairs.append((*choices.pairs[pair], {**columns, "raters": ", ".join(labels), "num_raters": len(labels)}))
    for old in folder.glob("train-*.parquet"):
        old.unlink()
    report = describe_agreement(choices.by_rater)
    if pairs:
        columns = {"probability_0": Value("float64"), "raters": Value("string"), "num_raters": Value("int64")}
        if warning := write_pairs(folder, pairs, columns):
            report += f"\nWarning: {warning}\n"
    ties = sum(row["label_0"] == 0.5 for *_, row in pairs)
    report = f"{len(pairs) - ties:,} pairs with a winner and {ties:,} ties in {folder}\n\n{report}"
    (folder / "report.md").write_text(report, encoding="utf-8")
    print(report)


def describe_agreement(by_rater):
    """What each rater did, and of every two the share of pairs of both on which they agree and Cohen's kappa (1960)."""
    lines = ["| rater | choices | ties | skips |", "|---|---|---|---|"]
    for rater, chosen in by_rater.items():
        counts = Counter(chosen.values())
        lines.append(f"| {rater} | {counts[0.0] + counts[1.0]:,} | {counts[0.5]:,} | {counts[None]:,} |")
    if len(by_rater) > 1:
        lines += ["", "| raters | pairs of both | agree | kappa |", "|---|---|---|---|"]
    for (rater, chosen), (other, theirs) in itertools.combinations(by_rater.items(), 2):
        both = [(chosen[pair], theirs[pair]) for pair in chosen if None not in (chosen[pair], theirs.get(pair))]
        if not both:
            lines.append(f"| {rater}, {other} | 0 | | |")
            continue
        agree = statistics.mean(first == second for first, second in both)
        counts = [Counter(labels) for labels in zip(*both)]
        chance = sum(counts[0][label] * counts[1][label] for label in counts[0]) / len(both) ** 2
        kappa = f"{(agree - chance) / (1 - chance):.2f}" if chance < 1 else ""
        lines.append(f"| {rater}, {other} | {len(both):,} | {agree:.0%} | {kappa} |")
    return "\n".join(lines) + "\n"


HTML = """
<form>
  <label>Your name <input name="rater" required maxlength="50" autocomplete="off"></label>
  <button>Start</button>
</form>
<section hidden>
  <h2></h2>
  <div class="pictures">
    <button data-action="left" aria-label="The left one is better"></button>
    <button data-action="right" aria-label="The right one is better"></button>
  </div>
  <div class="controls">
    <button data-action="left" class="side"><kbd>&larr;</kbd> Left</button>
    <button data-action="tie">Tie <kbd>space</kbd></button>
    <button data-action="undo">Undo <kbd>U</kbd></button>
    <button data-action="skip">Skip <kbd>S</kbd></button>
    <button data-action="right" class="side">Right <kbd>&rarr;</kbd></button>
  </div>
  <progress></progress>
  <p class="status"></p>
</section>
<p class="message" role="alert"></p>
"""
CSS = """
max-width: 1400px; margin: auto; text-align: center;
h2 { font-size: 1.2rem; font-weight: bold; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.pictures, .controls { display: flex; gap: .5rem; justify-content: center; }
.pictures button { flex: 1; border: 3px solid transparent; border-radius: 6px; }
.pictures button:hover { border-color: var(--color-accent); }
.pictures img { width: 100%; height: calc(100vh - 13rem); object-fit: contain; }
.controls { margin: .6rem 0; }
.controls button, form button, input { padding: .5rem 1rem; border: 1px solid gray; border-radius: 6px; background: none; }
kbd { opacity: .6; }
form { margin: 20vh auto; }
progress { width: 100%; accent-color: var(--color-accent); }
.status { opacity: .7; }
.message { color: #d00; font-weight: bold; }
@media (max-width: 640px) {
  .pictures { flex-direction: column; }
  .pictures img { height: calc(50vh - 7.5rem); }
  kbd, .side { display: none; }
}
"""
JS = """
const find = selector => element.querySelector(selector);
const keys = { ArrowLeft: "left", ArrowRight: "right", " ": "tie", u: "undo", s: "skip" };
let state = { pair: null }, loaded = {}, busy = false;
// Of this window alone, also after a reload.
sessionStorage.tab ??= Math.random().toString(36).slice(2);

const call = action =>
  server.act({ rater: sessionStorage.rater, tab: sessionStorage.tab, action, pair: state.pair });
const load = urls => urls.forEach(url => { (loaded[url] ??= new Image()).src = url; });

async function act(action) {
  if (busy || !sessionStorage.rater) return;
  busy = true;
  try {
    const answer = await call(action);
    find(".message").textContent = answer.error ?? "";
    if (!answer.error) await show(answer);
  } catch (error) {
    find(".message").textContent = "Not saved: no answer from the server. Is it running? Choose again, or reload the page.";
  }
  busy = false;
}

async function show(answer) {
  state = answer;
  sessionStorage.rater = state.rater;
  load([...state.pictures, ...state.ahead]);
  const images = state.pictures.map(url => loaded[url]);
  // Nothing can be chosen before it is seen.
  await Promise.all(images.map(image => image.decode()));
  for (const url in loaded) if (![...state.pictures, ...state.ahead].includes(url)) delete loaded[url];
  element.querySelectorAll(".pictures button").forEach((button, side) => button.replaceChildren(...images.slice(side, side + 1)));
  find("h2").textContent = state.pair ? state.prompt : "All pairs are rated. Thank you!";
  find("section").dataset.pair = state.pair ?? "";
  find("progress").max = state.total;
  find("progress").value = state.done;
  find(".status").textContent = `${state.rater}: ${state.status}`;
  find("form").hidden = true;
  find("section").hidden = false;
}

find("form").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.rater = find("input").value;
  act("start");
});
element.querySelectorAll("[data-action]").forEach(button => button.addEventListener("click", () => {
  // Or else the space key would press it again.
  button.blur();
  act(button.dataset.action);
}));
document.addEventListener("keydown", event => {
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || find("section").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act(action);
});
setInterval(() => state.rater && call("ping").catch(() => {}), 5000);
if (sessionStorage.rater) act("start");
"""


def main(args):
    """Runs a command; what it cannot work with is an error of one line and exit code 2."""
    try:
        args.command(args)
        return 0
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    # A code page prints what it can.
    sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(format="%(message)s")
    sys.exit(main(parse_args()))
