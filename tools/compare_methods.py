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

"""Finds out which method is best on your pairs: trains every row of a table of methods, draws, scores and reports.

    python tools/compare_methods.py docs/compare/small_world.toml --output_dir comparison

The file is written in TOML:

    [common]        flags of the training script, for all rows; seed may be a list, with one training for each
    [rows.NAME]     more flags, for one row
    [evaluation]    flags of eval_win_rate.py for prompts, pictures and scorers; and steps, a list: training ends after the
                    last of them, and each may be chosen
    [launch]        flags of `accelerate launch`

The pairs are encoded once. Every row is trained with every seed. The base model and every LoRA draw the prompts from the same
noise. The steps of a row are chosen by the mean of the first scorer on every other prompt, and reported on the prompts between
them. The output folder gets comparison.md, comparison.csv, comparison.png, and index.html with pictures. If the tool is stopped
or killed, the same command goes on. It needs Linux or macOS.
"""

import argparse
import contextlib
import csv
import html
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from common import (
    ROOT,
    ArgumentParser,
    end_with_parent,
    locked_folder,
    refuse_foreign,
    require_package,
    run,
    whole_file,
)
from intervals import win_rate_interval
from tqdm.auto import tqdm


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


# torch, diffusers and the modules that need them are imported where they are used: it takes seconds.
TABLES = ("common", "rows", "evaluation", "launch")
# Flags of the training script that this tool sets.
OWN_FLAGS = """
    output_dir max_train_steps num_train_epochs checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    allow_resume_changes push_to_hub
""".split()
# Flags that say where the pairs are. Trainings read the encoded pairs instead.
SOURCES = "dataset_name dataset_config_name dataset_split_name train_data_dir".split()
# Rows must not differ in these, nor in any flag of model and data that decides what the pairs are.
ALIKE = "encoded_data_dir num_eval_pairs pretrained_lora_path mixed_precision".split()
NO_MATTER = "vae_encode_batch_size cache_dir".split()
BASE, BASE_PICTURES = "base", "pictures/base"
SCORES_NAME, PROMPTS_NAME = "scores.json", "prompts.json"
# How tools show what is done of a training or of drawing in their output.
DONE = re.compile(rb"(?:Steps|Drawing):[^\r\n]*?\| *(\d+)/(\d+) \[")
PEAK_MEMORY = re.compile(r"peak memory ([\d.]+) GB")
POLL_SECONDS = 0.5


# The file


class Training(NamedTuple):
    row: str
    seed: int

    def __str__(self):
        return f"{self.row}, seed {self.seed}"

    @property
    def place(self):
        return f"{self.row}/seed-{self.seed}"


class Plan(NamedTuple):
    """What a file asks for."""

    script: str  # the file of the training script
    rows: dict  # the script's flags by row
    encoding: dict  # flags of tools/encode_preferences.py
    seeds: list
    steps: list
    evaluation: argparse.Namespace
    launch: list  # words of `accelerate launch`

    @property
    def trainings(self):
        """All trainings. Each row has its first before any row has its second."""
        return [Training(row, seed) for seed in self.seeds for row in self.rows]


def to_words(flags):
    """The words of a command line. A flag whose value is true stands alone, and one whose value is false is left out."""
    words = []
    for name, value in flags.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def parse_table(parser, flags, where, *others):
    """The arguments that a table gives, checked by a script's parser. A `ValueError` names the table and the flag."""
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    for name, value in flags.items():
        if name not in actions:
            raise ValueError(f"{where}: there is no flag --{name}.")
        if isinstance(value, bool) != (actions[name].nargs == 0):
            kind = "true or false" if actions[name].nargs == 0 else "a value"
            raise ValueError(f"{where}: {name} is {value!r}, but must be {kind}.")

    def fail(message):
        raise ValueError(f"{where}: {message}")

    parser.error = fail
    return parser.parse_args([*to_words(flags), *others])


def read_plan(file):
    """The `Plan` of a file. A `ValueError` names the table and the flag that is wrong."""
    from accelerate.commands.launch import launch_command_parser
    from eval_win_rate import add_evaluation_arguments

    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    common, rows, evaluation, launch = (tables.pop(name, {}) for name in TABLES)
    if tables:
        raise ValueError(f"{file}: there is no table [{next(iter(tables))}], only {', '.join(TABLES)}.")
    if not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{file}: [rows] must hold a table for each row, [rows.NAME], and nothing else.")
    steps, seeds = evaluation.pop("steps", None), common.pop("seed", 0)
    if not isinstance(steps, list) or not steps or not all(type(step) is int and step > 0 for step in steps):
        raise ValueError(f"{file}, [evaluation]: steps must be a list of numbers of steps, for example [500, 1000].")
    parser = ArgumentParser()
    add_evaluation_arguments(parser)
    arguments = parse_table(parser, evaluation, f"{file}, [evaluation]")
    parse_table(launch_command_parser(), launch, f"{file}, [launch]", "script.py")
    seeds = seeds if isinstance(seeds, list) else [seeds]
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(
            f"{file}, [common]: seed is {seeds}, but must be a number from 0 to 2**32 - 1, or different ones."
        )
    script, rows, encoding = read_rows(file, common, rows, seeds)
    return Plan(script, rows, encoding, seeds, sorted(set(steps)), arguments, to_words(launch))


def read_rows(file, common, rows, seeds):
    """The training script, its flags by row, and the flags to encode the pairs of all rows with."""
    import encode_preferences
    import preference_pairs
    import train_ncp_dpo_sd15

    parsed = {}
    for name, row in rows.items():
        where = f"{file}, [rows.{name}]"
        if not re.fullmatch(r"[\w.-]+", name) or name == BASE:
            raise ValueError(f"{where}: a row's name has letters, digits, _, . and - only, and is not {BASE}.")
        for flag in ("seed", *OWN_FLAGS):
            if flag in {**common, **row} and (flag != "seed" or flag in row):
                advice = "is given in [common] for all rows" if flag == "seed" else "is set by this tool"
                raise ValueError(f"{where}: {flag} {advice}, so remove it.")
        rows[name] = flags = {**common, **row}
        base = parse_table(train_ncp_dpo_sd15.create_parser(), {**flags, "seed": seeds[0]}, where)
        trainer = encode_preferences.choose_trainer(base)
        parsed[name] = parse_table(trainer.create_parser(), flags, where)

    parser = ArgumentParser()
    preference_pairs.add_arguments(parser)
    data_flags = [action.dest for action in parser._actions if action.dest not in ("help", *NO_MATTER)]
    first, *others = parsed
    for other in others:
        for flag in (*data_flags, *ALIKE):
            ours, theirs = (getattr(parsed[name], flag) for name in (first, other))
            if ours != theirs:
                raise ValueError(
                    f"{file}: rows {first} and {other} cannot be compared: {flag} is {ours!r} in one and {theirs!r} in the "
                    "other. Give it in [common]."
                )
    for name, flags in rows.items():
        encoded = argparse.Namespace(**{**vars(parsed[name]), **dict.fromkeys(SOURCES)})
        encoded.encoded_data_dir = flags.get("encoded_data_dir", "encoded")
        try:
            trainer.check_arguments(encoded)
            encoded.encoded_data_dir = flags.get("encoded_data_dir")
            trainer.check_checkpoint(encoded)
        except ValueError as error:
            raise ValueError(f"{file}, [rows.{name}]: {error}") from error
    encoding_flags = {action.dest for action in encode_preferences.create_parser()._actions}
    encoding = {name: value for name, value in rows[first].items() if name in encoding_flags}
    return Path(trainer.__file__).name, rows, encoding


class Comparison:
    """The output folder of a plan: where everything is, and what is done already."""

    def __init__(self, plan, folder):
        self.plan, self.folder = plan, Path(folder)
        given = next(iter(plan.rows.values())).get("encoded_data_dir")
        self.encoded, self.is_encoded_before = Path(given or self.folder / "encoded"), given is not None

    def run_of(self, training):
        """The output folder of a training."""
        return self.folder / "rows" / training.place

    def record_of(self, training):
        return self.folder / "rows" / f"{training.place}.json"

    def log_of(self, job):
        return self.folder / "logs" / f"{job.replace('/', '-')}.log"

    def pictures_of(self, training, step):
        return self.folder / "pictures" / training.place / f"step-{step}"

    def picture_folders(self, trainings):
        """The folders of the base's pictures and of those of each step of trainings."""
        return [self.folder / BASE_PICTURES] + [
            self.pictures_of(training, step) for training in trainings for step in self.plan.steps
        ]

    def lora_of(self, training, step):
        return self.run_of(training) / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors"

    def is_trained(self, training):
        return all(self.lora_of(training, step).is_file() for step in self.plan.steps)

    def flags_of(self, training):
        """The flags that decide what a training learns."""
        flags = {name: value for name, value in self.plan.rows[training.row].items() if name not in SOURCES}
        return {**flags, "seed": training.seed, "encoded_data_dir": str(self.encoded)}

    def read_record(self, training):
        path = self.record_of(training)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write_record(self, training, record):
        self.record_of(training).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.record_of(training), record)


def write_json(path, value):
    with whole_file(path) as incomplete:
        incomplete.write_text(json.dumps(value, indent=2), encoding="utf-8")


# Before anything runs


def read_captions(comparison):
    """The captions of the pairs: those of the encoded pairs if all are encoded, otherwise those of the data set."""
    import encode_preferences
    from datasets import Dataset

    file = comparison.encoded / "encoding.json"
    if file.is_file():
        counts = json.loads(file.read_text(encoding="utf-8"))
        parts = {part: sorted((comparison.encoded / part).glob("*.arrow")) for part in ("pairs", "prompts")}
        if all(len(paths) == counts[f"num_{part}_shards"] for part, paths in parts.items()):
            return [caption for path in parts["prompts"] for caption in Dataset.from_file(str(path))["caption"]]
    if comparison.is_encoded_before:
        raise ValueError(
            f"encoded_data_dir {comparison.encoded} is no complete output of tools/encode_preferences.py."
        )
    args = encode_preferences.parse_args(
        [*to_words(comparison.plan.encoding), "--output_dir", str(comparison.encoded)]
    )
    with ThreadPoolExecutor(args.num_workers) as pool:
        return encode_preferences.open_source(args, pool).captions


def choose_prompts(plan, captions):
    """The prompts to draw. Those that are trained on are named and left out."""
    from pictures import load_prompts
    from preference_pairs import same_prompt_key

    prompts, trained = load_prompts(plan.evaluation), set(map(same_prompt_key, captions))
    chosen = [prompt for prompt in prompts if same_prompt_key(prompt) not in trained]
    if left_out := [prompt for prompt in prompts if same_prompt_key(prompt) in trained]:
        print(
            f"{len(left_out)} of {len(prompts)} prompts are trained on and left out, the first is {left_out[0]!r:.80}"
        )
    if len(chosen) < 2:
        raise ValueError(
            f"[evaluation]: {len(chosen)} prompts are not trained on, but the comparison needs two or more. Give others."
        )
    return chosen


def open_base(plan):
    """The `Source` of the base's pictures."""
    from pictures import Flags, open_source

    flags = next(iter(plan.rows.values()))
    values = [
        flags.get(flag) for flag in ("pretrained_model_name_or_path", "variant", "revision", "pretrained_lora_path")
    ]
    return open_source(plan.evaluation, Flags(lora="pretrained_lora_path"), *values)


def check_trainings(comparison):
    """A `ValueError` if a training of the folder has other flags than the file gives now."""
    for training in comparison.plan.trainings:
        record, flags = comparison.read_record(training), comparison.flags_of(training)
        before = record.get("flags", flags)
        for name in {**flags, **before}:
            if flags.get(name) != before.get(name):
                run = comparison.run_of(training)
                raise ValueError(
                    f"[rows.{training.row}]: {name} is {flags.get(name)!r}, but was {before.get(name)!r} for {run}. Give the "
                    f"same value or another --output_dir, or remove {run}, {run}.json and the row's pictures."
                )


def check_inputs(comparison, trainings):
    """A `ValueError` if a training read other images or started from another base model than the first of them."""
    first = None
    for training in trainings:
        checkpoint = comparison.lora_of(training, comparison.plan.steps[-1]).parent
        state = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
        inputs = {**state["models"], "images": state["data"].get("images")}
        inputs.pop("lora", None)  # Rows may start from different LoRAs.
        first = first or inputs
        if others := [name for name in inputs if inputs[name] != first.get(name)]:
            run = comparison.run_of(training)
            raise ValueError(
                f"{run} cannot be compared with {comparison.run_of(trainings[0])}: {', '.join(others)} changed between them. "
                f"Remove {run} and {run}.json, or give another --output_dir."
            )


# Child processes


class Outcome(NamedTuple):
    """How a child process ended, and its peak memory in GB: the GPU's if there is one. `None` if it is not known."""

    code: int
    peak_memory: float | None


def launch(launcher, script, words, log, show_progress):
    """
    Runs one of this repository's scripts by `accelerate launch`, appends its output to the file `log`, and calls
    `show_progress` with the done share of its work. The child ends with this process.
    """
    import torch

    wait_for_earlier(words)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launcher]
    command += [str(ROOT / script), *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # The terminal sends Ctrl-C to this process only, which passes it on.
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        while True:
            number, status, usage = os.wait4(process.pid, os.WNOHANG)
            if number:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            show_progress(find_progress(log, start))
            time.sleep(POLL_SECONDS)
    except BaseException:
        stop(process)
        raise
    if torch.cuda.is_available():
        output = log.read_bytes()[start:].decode(errors="replace")
        peak_memory = max(map(float, PEAK_MEMORY.findall(output)), default=None)
    else:
        # In KB, on macOS in bytes.
        peak_memory = usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return Outcome(process.returncode, peak_memory)


def wait_for_earlier(words):
    """Waits for the same script of an earlier run, which was killed. A training may still be saving a checkpoint."""
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if (process.info["cmdline"] or [])[-len(words) :] == words and process.info["cwd"] == os.getcwd():
            tqdm.write(f"Waiting for process {process.pid} of an earlier run to end", file=sys.stderr)
            process.wait()


def find_progress(log, start):
    """The done share of the work of a child, as far as its output from byte `start` on tells."""
    with open(log, "rb") as file:
        file.seek(max(start, log.stat().st_size - 4096))
        found = DONE.findall(file.read())
    return int(found[-1][0]) / int(found[-1][1]) if found else 0.0


def stop(process):
    """Stops the scripts that a launcher has started and waits for them. A training saves a checkpoint first."""
    try:
        launcher = psutil.Process(process.pid)
        for each in launcher.children() or [launcher]:
            each.terminate()
        process.wait()
    finally:
        # Reached early by a second signal.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def stop_signals():
    """Signals to stop end the program as an exception does, so that child processes are stopped."""

    def receive(number, frame):
        sys.exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Progress:
    """One bar for all trainings and pictures. A step counts as much as a picture."""

    def __init__(self, total, done):
        self.bar = tqdm(total=total, initial=done, unit=" steps and pictures")

    @contextlib.contextmanager
    def part(self, description, size):
        """The bar while a part of the work is done. Yields a function that takes the done share of the part."""
        self.bar.set_description(description)
        start = self.bar.n

        def show(share):
            self.bar.update(start + round(share * size) - self.bar.n)

        yield show
        show(1)


def report_failure(job, log):
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    tqdm.write(f"{job} failed: {lines[-1][:300] if lines else 'no output'}\nIts output is in {log}.", file=sys.stderr)


# The work


def encode(comparison, progress):
    if comparison.is_encoded_before or all(map(comparison.is_trained, comparison.plan.trainings)):
        return
    words = [*to_words(comparison.plan.encoding), "--output_dir", str(comparison.encoded)]
    log = comparison.log_of("encode")
    with progress.part("Encoding the pairs", 0) as show:
        outcome = launch(comparison.plan.launch, "tools/encode_preferences.py", words, log, show)
    if outcome.code:
        report_failure("Encoding the pairs", log)
        raise ValueError(f"The pairs could not be encoded, see {log}.")


def train(comparison, training, progress):
    """Trains, or goes on with a training. Returns whether it succeeds."""
    plan, flags = comparison.plan, comparison.flags_of(training)
    words = {
        **flags,
        "max_train_steps": plan.steps[-1],
        "checkpointing_steps": math.gcd(*plan.steps),
        "output_dir": comparison.run_of(training),
        "resume_from_checkpoint": "latest",
    }
    log, record = (
        comparison.log_of(training.place),
        {"seconds": 0.0, **comparison.read_record(training), "flags": flags},
    )
    comparison.write_record(training, record)
    before, start = record["seconds"], time.monotonic()
    try:
        with progress.part(f"Training {training}", plan.steps[-1]) as show:
            outcome = launch(plan.launch, plan.script, to_words(words), log, show)
        record["peak_memory"] = outcome.peak_memory
    finally:
        record["seconds"] = before + time.monotonic() - start
        comparison.write_record(training, record)
    if not comparison.is_trained(training):
        report_failure(f"Training {training}", log)
        return False
    return True


def draw(args, comparison, trainings, progress):
    """Draws and scores the base's and trainings' pictures. Returns whether it succeeds."""
    names = [training.place for training in trainings]
    log = comparison.log_of("draw" if len(names) != 1 else f"draw-{names[0]}")
    words = [args.rows, "--output_dir", str(comparison.folder), "--draw", *names]
    pictures = count_pictures(comparison, trainings)
    with progress.part("Drawing and scoring", pictures[1] - pictures[0]) as show:
        outcome = launch(comparison.plan.launch, "tools/compare_methods.py", words, log, show)
    if outcome.code:
        report_failure("Drawing and scoring", log)
    return outcome.code == 0


def count_pictures(comparison, trainings):
    """The numbers of pictures that are there and that there will be."""
    folders = comparison.picture_folders(trainings)
    prompts = json.loads((comparison.folder / PROMPTS_NAME).read_text(encoding="utf-8"))
    each = len(prompts) * comparison.plan.evaluation.num_images_per_prompt
    return sum(len(list(folder.glob("*.png"))) for folder in folders), each * len(folders)


def draw_and_score(plan, comparison, names):
    """What the child processes do that draw and score."""
    from accelerate import Accelerator
    from eval_win_rate import describe_side
    from pictures import choose_precision, draw_pictures, list_pictures, save_settings
    from scorers import load_scorers, score_pictures

    args, accelerator = plan.evaluation, Accelerator()
    args.mixed_precision = choose_precision(args, accelerator)
    prompts = json.loads((comparison.folder / PROMPTS_NAME).read_text(encoding="utf-8"))
    base = open_base(plan)
    sources = {comparison.folder / BASE_PICTURES: base}
    for training in plan.trainings:
        if training.place in names:
            flags = base.flags._replace(lora="lora_weights")
            for step in plan.steps:
                source = base._replace(lora=comparison.lora_of(training, step), flags=flags)
                sources[comparison.pictures_of(training, step)] = source
    if accelerator.is_main_process:
        for folder, source in sources.items():
            save_settings(folder, *describe_side(args, source, None, source.lora and str(source.lora)), prompts)
    scorers = load_scorers(args)
    pictures = {folder: list_pictures(args, folder, prompts, source) for folder, source in sources.items()}
    if accelerator.is_main_process:
        for folder, of_folder in pictures.items():
            if not all(Path(picture.path).is_file() for picture in of_folder):
                # The scores may be of pictures that were removed.
                (folder / SCORES_NAME).unlink(missing_ok=True)
    draw_pictures(args, accelerator, [picture for of_folder in pictures.values() for picture in of_folder])
    accelerator.wait_for_everyone()
    for folder, of_folder in pictures.items():
        file = folder / SCORES_NAME
        scored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        missing = {
            name: scorer
            for name, scorer in scorers.items()
            if scored.get(name, {}).get("version") != scorer.version or len(scored[name]["scores"]) != len(of_folder)
        }
        if missing:
            captions, paths = [picture.prompt for picture in of_folder], [picture.path for picture in of_folder]
            scores = score_pictures(accelerator, missing, captions, paths, f"Scoring: {folder.name}")
            scored |= {name: {"version": missing[name].version, "scores": values} for name, values in scores.items()}
            if accelerator.is_main_process:
                write_json(file, scored)
        accelerator.wait_for_everyone()
    accelerator.end_training()


# The report


class Result(NamedTuple):
    """What a scorer says of a row after some steps, on the prompts that are reported."""

    choosing: float  # the mean score of the other prompts, which choose the steps
    median: float
    over_base: tuple  # an `Interval` of the win rate
    over_first: tuple  # the same, over the first row after its own chosen steps


def split_prompts(num_prompts, num_steps):
    """The numbers of the prompts that choose steps and of those that are reported, which are all if there is no choice."""
    everything = np.arange(num_prompts)
    return (everything[::2], everything[1::2]) if num_steps > 1 else (everything, everything)


def read_scores(comparison, folder, name, num_prompts):
    """A scorer's scores of a folder's pictures, of shape `(prompts, pictures of a prompt)`."""
    scores = json.loads((folder / SCORES_NAME).read_text(encoding="utf-8"))[name]["scores"]
    return np.reshape(scores[: num_prompts * comparison.plan.evaluation.num_images_per_prompt], (num_prompts, -1))


def measure(comparison, trainings, names, num_prompts):
    """
    The chosen steps by row, and the `Result`s by scorer, row and steps. `trainings` are those that succeeded.
    """
    from eval_win_rate import count_wins

    steps = comparison.plan.steps
    choosing, reported = split_prompts(num_prompts, len(steps))
    by_row = {row: [each for each in trainings if each.row == row] for row in comparison.plan.rows}
    by_row = {row: of_row for row, of_row in by_row.items() if of_row}
    scores = {
        (name, training, step): read_scores(comparison, comparison.pictures_of(training, step), name, num_prompts)
        for name in names
        for training in trainings
        for step in steps
    }
    base = {name: read_scores(comparison, comparison.folder / BASE_PICTURES, name, num_prompts) for name in names}

    def choosing_score(name, row, step):
        return float(np.mean([scores[name, training, step][choosing] for training in by_row[row]]))

    def win_rate(name, ours, theirs):
        """The interval for pairs of score tables, a pair for each training."""
        return win_rate_interval([count_wins(a[reported], b[reported]) for a, b in zip(ours, theirs)])

    chosen = {row: max(steps, key=lambda step: choosing_score(names[0], row, step)) for row in by_row}
    first, results = next(iter(comparison.plan.rows)), {}
    for name in names:
        for row, of_row in by_row.items():
            for step in steps:
                ours = [scores[name, training, step] for training in of_row]
                against_first = None
                # Trainings with the same seed have seen the same pairs with the same noise.
                common = [each.seed for each in of_row if Training(first, each.seed) in trainings]
                if row != first and common:
                    against_first = win_rate(
                        name,
                        [scores[name, Training(row, seed), step] for seed in common],
                        [scores[name, Training(first, seed), chosen[first]] for seed in common],
                    )
                results[name, row, step] = Result(
                    choosing_score(name, row, step),
                    float(np.median([table[reported] for table in ours])),
                    win_rate(name, ours, [base[name]] * len(ours)),
                    against_first,
                )
    return chosen, results


def costs(comparison, trainings, row):
    """The mean seconds of a row's trainings, and their highest peak memory in GB or `None`."""
    records = [comparison.read_record(training) for training in trainings if training.row == row]
    # A training that was stopped after its last checkpoint has none.
    memory = [record["peak_memory"] for record in records if record.get("peak_memory") is not None]
    return float(np.mean([record["seconds"] for record in records])), max(memory, default=None)


def write_csv(comparison, trainings, chosen, results):
    interval = ("", "_low", "_high")
    columns = ["row", "steps", "chosen", "scorer", "trainings", "choosing_score", "median"]
    columns += [f"win_rate_over_{name}{end}" for name in ("base", "first_row") for end in interval]
    with whole_file(comparison.folder / "comparison.csv") as incomplete:
        with open(incomplete, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*columns, "seconds", "peak_memory_gb"])
            for (name, row, step), result in results.items():
                number = sum(training.row == row for training in trainings)
                over_first = result.over_first or ("", "", "")
                seconds, memory = costs(comparison, trainings, row)
                writer.writerow(
                    [row, step, int(step == chosen[row]), name, number, result.choosing, result.median]
                    + [*result.over_base, *over_first, round(seconds, 1), "" if memory is None else round(memory, 3)]
                )


def describe(comparison, trainings, failed, prompts, versions, chosen, results):
    """The text of comparison.md."""
    plan, args = comparison.plan, comparison.plan.evaluation
    first, several = next(iter(plan.rows)), len(plan.steps) > 1
    _, reported = split_prompts(len(prompts), len(plan.steps))

    def percent(interval):
        return "" if interval is None else "{:.0%} ({:.0%} – {:.0%})".format(*interval)

    lines = ["# Comparison", ""]
    for number, (name, version) in enumerate(versions.items()):
        head = ["row", "trainings", "steps", f"median {name}", "beats the base", f"beats {first}"]
        head += ["seconds", "GB"] if number == 0 else []
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in chosen:
            result, of_row = results[name, row, chosen[row]], [each for each in trainings if each.row == row]
            cells = [row, len(of_row), chosen[row], f"{result.median:.4g}", percent(result.over_base)]
            cells += [percent(result.over_first)]
            if number == 0:
                seconds, memory = costs(comparison, trainings, row)
                cells += [f"{seconds:.0f}", "" if memory is None else f"{memory:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    if failed:
        lines += [
            *(f"- **{each} failed** and is left out: its output is in `{log}`." for each, log in failed.items()),
            "",
        ]
    lines += ["![Win rate over the base against steps](comparison.png)", ""]
    if several:
        lines.append(
            f"- Steps were chosen from {', '.join(map(str, plan.steps))} by the mean {next(iter(versions))} of every other "
            f"prompt. The numbers are of the {len(reported)} prompts between them."
        )
    lines += [
        f"- {len(prompts)} prompts, {args.num_images_per_prompt} pictures each from the same noise for the base and for every "
        f"row. Noise seed {args.seed}, {args.num_inference_steps} inference steps, guidance scale {args.guidance_scale:g}.",
        f"- Training seeds: {', '.join(map(str, plan.seeds))}. Trainings of a row and of {first} with the same seed are compared.",
        "- Win rates count a tie as one half. The 95 % intervals are over prompts and trainings. Those of one training say "
        "nothing about other trainings, and those of two are rough.",
        "- *seconds* is the mean time of a training with its start, *GB* the highest peak memory. Time before a kill is not in it.",
        *(f"- {name}: `{version}`" for name, version in versions.items()),
    ]
    return "\n".join(lines) + "\n"


def plot(comparison, chosen, results, names):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = comparison.plan.steps
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names) + 1, 4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for row in chosen:
            rates = np.array([results[name, row, step].over_base for step in steps])
            (line,) = axis.plot(steps, rates[:, 0], marker="o", label=row)
            axis.fill_between(steps, rates[:, 1], rates[:, 2], color=line.get_color(), alpha=0.12)
        axis.axhline(0.5, color="grey", linewidth=1)
        axis.set(xlabel="steps", title=f"win rate over the base, {name}", ylim=(0, 1))
        axis.legend(fontsize="small")
    figure.tight_layout()
    with whole_file(comparison.folder / "comparison.png") as incomplete:
        figure.savefig(incomplete, dpi=110, format="png")
    pyplot.close(figure)


def write_page(comparison, trainings, prompts, names, chosen):
    """`index.html`: a line for each reported prompt, with a picture of the base and of each row's first training."""
    args, num_prompts = comparison.plan.evaluation, len(prompts)
    columns = {BASE: comparison.folder / BASE_PICTURES}
    for row, step in chosen.items():
        training = next(each for each in trainings if each.row == row)
        columns[f"{training}, {step} steps"] = comparison.pictures_of(training, step)
    scores = {
        (name, column): read_scores(comparison, folder, name, num_prompts)
        for name in names
        for column, folder in columns.items()
    }
    picture = "{:05}.png" if args.num_images_per_prompt == 1 else "{:05}-00.png"
    lines = []
    for index in split_prompts(num_prompts, len(comparison.plan.steps))[1].tolist():
        cells = []
        for column, folder in columns.items():
            source = (folder.relative_to(comparison.folder) / picture.format(index)).as_posix()
            values = ", ".join(f"{name} {scores[name, column][index, 0]:.4g}" for name in names)
            cells.append(f'<td><img src="{source}" loading="lazy"><br>{html.escape(values)}</td>')
        lines.append(f"<tr><td>{html.escape(prompts[index])}</td>{''.join(cells)}</tr>")
    page = (
        '<!doctype html><meta charset="utf-8"><title>Comparison</title>'
        "<style>body{font-family:sans-serif}img{width:256px}td{vertical-align:top;padding:6px}"
        "th{position:sticky;top:0;background:white}</style>"
        f"<table><tr><th>prompt</th>{''.join(f'<th>{html.escape(column)}</th>' for column in columns)}</tr>"
        f"{''.join(lines)}</table>"
    )
    (comparison.folder / "index.html").write_text(page, encoding="utf-8")


def report(comparison, trainings, failed, prompts, versions):
    names = list(versions)
    chosen, results = measure(comparison, trainings, names, len(prompts))
    write_csv(comparison, trainings, chosen, results)
    plot(comparison, chosen, results, names)
    write_page(comparison, trainings, prompts, names, chosen)
    text = describe(comparison, trainings, failed, prompts, versions, chosen, results)
    (comparison.folder / "comparison.md").write_text(text, encoding="utf-8")
    print(text)


def compare(args, comparison, prompts, versions):
    """Does what is missing, and reports. Returns the exit code, 1 if a training failed."""
    plan, failed = comparison.plan, {}
    write_json(comparison.folder / PROMPTS_NAME, prompts)
    there, total = count_pictures(comparison, plan.trainings)
    num_trained = sum(map(comparison.is_trained, plan.trainings))
    size = plan.steps[-1]
    progress = Progress(total + size * len(plan.trainings), there + size * num_trained)
    encode(comparison, progress)
    for training in plan.trainings:
        if not comparison.is_trained(training) and not train(comparison, training, progress):
            failed[training] = comparison.log_of(training.place)
    trained = [training for training in plan.trainings if training not in failed]
    check_inputs(comparison, trained)
    if not draw(args, comparison, trained, progress):
        # Another LoRA may have failed than the one in question. The base must succeed.
        if not draw(args, comparison, [], progress):
            raise ValueError(f"The base's pictures could not be drawn and scored, see {comparison.log_of('draw')}.")
        for training in trained:
            if not draw(args, comparison, [training], progress):
                failed[training] = comparison.log_of(f"draw-{training.place}")
    progress.bar.close()
    trained = [training for training in trained if training not in failed]
    if not trained:
        raise ValueError(f"All trainings failed, see {comparison.folder / 'logs'}.")
    report(comparison, trained, failed, prompts, versions)
    return 1 if failed else 0


def parse_args(input_args=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="The file of rows, for example docs/compare/spaces.toml.")
    parser.add_argument("--output_dir", default="comparison", help="Folder for all output.")
    parser.add_argument("--draw", nargs="*", help=argparse.SUPPRESS)  # what child processes do
    return parser.parse_args(input_args)


def main(args):
    plan = read_plan(args.rows)
    comparison = Comparison(plan, args.output_dir)
    if args.draw is not None:
        return draw_and_score(plan, comparison, args.draw)
    from scorers import load_scorers

    require_package("matplotlib")
    names = ("comparison.md", "comparison.csv", "comparison.png", "index.html", PROMPTS_NAME)
    refuse_foreign(comparison.folder, "rows", names)
    check_trainings(comparison)
    open_base(plan)
    prompts = choose_prompts(plan, read_captions(comparison))
    versions = {name: scorer.version for name, scorer in load_scorers(plan.evaluation).items()}
    with locked_folder(comparison.folder), stop_signals():
        return compare(args, comparison, prompts, versions)


if __name__ == "__main__":
    end_with_parent(if_launched=True)
    run(main, parse_args)
