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
"""
Checks, filters and converts preference pairs for `train_ncp_dpo_sd15.py` and `train_ncp_dpo_sdxl.py`.

The trainers read four columns: `jpg_0` and `jpg_1` (encoded images), `label_0` (1: image 0 wins, 0: image 1 wins, 0.5:
a tie, left out) and `caption`. They come from a hub id or a local folder of parquet files (`--dataset_name`), or from
a folder of images whose `metadata.jsonl` gives `jpg_0_file_name`, `jpg_1_file_name`, `label_0` and `caption`
(`--train_data_dir`). Rows are counted from 0.

`check` reads a dataset once, as training does, and reports what training would stop at. The exit code is 0 if the data
are fit for training, 1 if training would stop and 2 if they cannot be read:

    python tools/prepare_preferences.py check --dataset_name my_pairs --pretrained_model_name_or_path MODEL
    python tools/prepare_preferences.py check --train_data_dir my_images --resolution 1024

`filter` keeps the pairs whose winner never lost or drew under its prompt. `convert rows` makes a dataset of them:

    python tools/prepare_preferences.py filter --dataset_name pick_a_pic --min_wins 2 --output_file kept.parquet
    python tools/prepare_preferences.py convert rows --rows_file kept.parquet --dataset_name pick_a_pic --output_dir filtered

`convert` also makes a dataset for the trainers from other shapes:

    # columns `prompt`, `chosen` and `rejected`
    python tools/prepare_preferences.py convert pairs --dataset_name trl_pairs --output_dir my_pairs
    # ranked images of each prompt: one image in a row, or a list of images and a list of ranks in a row
    python tools/prepare_preferences.py convert rankings --dataset_name ranked --pairs best_worst --output_dir my_pairs
    # two folders of images with the same names, captions in .txt files beside the winners
    python tools/prepare_preferences.py convert folders --winners better --losers worse --output_dir my_pairs
    # Pick-a-Pic's metadata, or what `filter` kept of it, and images that are kept elsewhere under their uids
    python tools/prepare_preferences.py convert pick_a_pic --dataset_name kept.parquet --images_dir images --output_dir my_pairs

`filter` and `convert` read parquet files in order where they are, so the size of a dataset does not matter. `datasets`
keeps a copy under `--cache_dir` for `check`, as for training, and where rows are needed in another order (rankings with
one image in a row, `--images_dataset`). `convert` copies encoded images without decoding them and names what it skips.
Run `check` on what it wrote.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from common import (
    COUNT,
    SCHEMA,
    ArgumentParser,
    ParquetFiles,
    add_command,
    iter_rows,
    map_ahead,
    name_source,
    pair_ranks,
    read_metadata,
    require_columns,
    run,
    source_warning,
    whole_file,
    write_shards,
)
from datasets import Dataset, Features, Image, Value
from PIL import UnidentifiedImageError
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


logger = logging.getLogger("prepare_preferences")

IMAGE_EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
METADATA_BATCH_SIZE = 100_000
LISTS = (datasets.List, datasets.LargeList)
# Columns of the images' ids in Pick-a-Pic.
UID_COLUMNS = ["image_0_uid", "image_1_uid"]


# Reading other columns and shapes than training's


def load_rows(args, columns, image_columns=None, in_place=True):
    """
    Opens `--dataset_name` or `--train_data_dir`, see `open_dataset`. Images stay encoded, or are the names of their files.

    `columns` and `image_columns`, `{flag: column}`, must be there. With image columns, the rows have only these and
    `columns`. Without, they have every column that holds no image, and no image data is read from the disk.
    """
    check_source(args)
    image_columns = image_columns or {}
    if args.train_data_dir is not None:
        source = os.path.join(args.train_data_dir, "metadata.jsonl")
        dataset = read_metadata(source)
        file_names = {flag: f"{column}_file_name" for flag, column in image_columns.items()}
    else:
        source, file_names = f"--dataset_name {args.dataset_name}", image_columns
        dataset = open_dataset(
            args.dataset_name, args.dataset_config_name, args.dataset_split_name, args.cache_dir, in_place
        )
    require_columns(columns | file_names, dataset.features, source)
    arrow_type = str(dataset.features.arrow_schema.field(args.caption_column).type)
    if not re.match("null|(large_)?string", arrow_type):
        raise ValueError(
            f"{source}: column {args.caption_column} (--caption_column) is of type {arrow_type}, not text"
        )
    if not image_columns:
        return dataset.select_columns([name for name, kind in dataset.features.items() if not holds_images(kind)])
    dataset = dataset.select_columns(list(dict.fromkeys([*file_names.values(), *columns.values()])))
    if args.train_data_dir is not None:
        dataset = dataset.rename_columns(dict(zip(file_names.values(), image_columns.values())))
    return dataset


def check_source(args):
    """Raises a `ValueError` unless exactly one of the two sources is given."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("give either --dataset_name or --train_data_dir, and not both")


def flags_of(args, *names):
    """`{flag: column}` of those of these flags that are given."""
    return {f"--{name}": getattr(args, name) for name in names if getattr(args, name) is not None}


def holds_images(feature):
    """Whether a column of this feature holds images or other binary data."""
    if isinstance(feature, dict):
        return any(holds_images(value) for value in feature.values())
    if isinstance(feature, LISTS):
        return holds_images(feature.feature)
    return isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary"))


def open_dataset(name, config_name, split, cache_dir, in_place):
    """
    Opens a hub id, a local folder or a local parquet file. With `in_place`, parquet files are opened as `ParquetFiles`.
    All else is a `datasets.Dataset` in arrow format, in the cache, whose rows can be read in any order.
    """
    if os.path.isfile(name):
        source = {"path": "parquet", "data_files": {split: name}, "cache_dir": cache_dir}
    else:
        source = {"path": name, "name": config_name, "cache_dir": cache_dir}
    try:
        data_files = datasets.load_dataset_builder(**source).config.data_files or {}
        if data_files and split.isidentifier() and split not in data_files:
            # Without this check, all splits would be copied before the error.
            raise ValueError(f"its splits (--dataset_split_name) are {', '.join(map(str, data_files))}")
        files = data_files.get(split, [])
        if in_place and files and all(file.endswith(".parquet") for file in files):
            return ParquetFiles(files)
        if local := [file for file in itertools.chain(*data_files.values()) if os.path.isfile(file)]:
            from preference_pairs import digest_files

            # A replaced file may have the same time. Then `datasets` would read its cache of the old file.
            source["description"] = digest_files(local)
        return datasets.load_dataset(**source, split=split).with_format("arrow")
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load {name}, split {split}: {error}") from error


def encoded_bytes(value, args=None):
    """
    The encoded bytes of an image that is given as bytes, as a path or as `datasets`' `{"bytes", "path"}`. A ValueError
    or OSError says why there are none. With `args`, a path that is text comes from the data and may lead only where it may
    in training. A `Path` was found in a folder of the user and may lead anywhere.
    """
    if not isinstance(value, Path):
        if isinstance(value, (bytes, str)):
            value = {"bytes" if isinstance(value, bytes) else "path": value}
        if not isinstance(value, (dict, type(None))):
            raise ValueError(f"{value!r:.80} instead of an image")
        value = {"bytes": None, "path": None, **(value or {})}
        if args is not None:
            from preference_pairs import image_bytes

            value = image_bytes(args, value)
        else:
            value = value["path"] if value["bytes"] is None else value["bytes"]
    data = value if isinstance(value, bytes) else Path(value).read_bytes()
    if not data:
        raise ValueError("empty, 0 bytes")
    return data


def find_image_source(args):
    """The flags that say in which folder images must lie if the data name files."""
    source = argparse.Namespace(**{"train_data_dir": None, "dataset_name": None, "cache_dir": None, **vars(args)})
    if getattr(args, "images_dataset", None) is not None:
        source.train_data_dir, source.dataset_name = None, args.images_dataset
    if source.dataset_name is not None and os.path.isfile(source.dataset_name):
        source.dataset_name = os.path.dirname(os.path.abspath(source.dataset_name))
    return source


def digest_of(data):
    """A number that tells contents apart. It fits an int64."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


# check


ERRORS = {
    "unreadable images": "training stops at one",
    "bad labels": "not 1, 0 or 0.5; training stops at one",
    "bad captions": "null; training stops at one",
    "bad probabilities": "not from 0 to 1; training stops at one",
}
# Columns that say how a picture was made. `collect_preferences.py` writes all of them, Pick-a-Pic has the models.
SOURCE_COLUMNS = ["model_0", "model_1", "lora_weights_0", "lora_weights_1"]


def check(args):
    """Reads every row once, prints a report, and returns 1 if training would stop on the dataset, else 0."""
    check_source(args)
    from preference_pairs import load_dataset

    tokenizer, max_tokens = load_tokenizer(args)
    dataset = load_dataset(args)
    columns = read_columns(args, [*UID_COLUMNS, *SOURCE_COLUMNS])
    unknown = [None] * len(dataset)
    uids = zip(*(columns.get(name, unknown) for name in UID_COLUMNS))
    probabilities = itertools.repeat(1)
    if args.preference_probability_column is not None:
        probabilities = dataset[args.preference_probability_column]
    inspection = Inspection(args)
    inspected = tqdm(inspect_rows(args, dataset), total=len(dataset), unit=" rows", desc="check")
    for row, ((label, caption, images), *others) in enumerate(zip(inspected, probabilities, uids)):
        inspection.add(row, label, caption, images, *others)
    findings = inspection.findings
    findings |= find_repeats(inspection.pairs)
    for caption, row in inspection.captions.items() if tokenizer else ():
        if (length := len(tokenizer(caption, verbose=False).input_ids)) > max_tokens:
            findings["long captions"].append(f"row {row}: {length} tokens")
    counts = {
        "rows": (len(dataset), ""),
        "pairs": (inspection.num_pairs, "  with a preference: what training reads"),
        "ties": (inspection.num_ties, "  left out of training"),
        "prompts": (len(inspection.prompts), "  different captions of the pairs, apart from spaces and case"),
    }
    print_report(args, counts, findings, inspection.sizes, max_tokens)
    if warning := source_warning(read_sources(dataset[args.label_column], columns)):
        print(f"Warning: {warning}\n")

    errors = [f"{len(findings[kind]):,} {kind}" for kind in ERRORS if findings[kind]]
    if inspection.num_pairs == 0:
        errors.append("no pair is left")
    print(f"Not fit for training: {', '.join(errors)}." if errors else "Fit for training.")
    return 1 if errors else 0


class Inspection:
    """Counts and findings of the rows so far."""

    def __init__(self, args):
        self.args, self.num_pairs, self.num_ties = args, 0, 0
        self.findings = defaultdict(list)  # kind -> texts that each name a row
        self.sizes, self.prompts, self.captions = Counter(), {}, {}
        self.pairs = []  # (row, prompt, winner, loser) as numbers

    def add(self, row, label, caption, images, probability, uids):
        """`images` are what `inspect_image` returns, `uids` the images' ids or `None`."""
        from preference_pairs import find_problem, same_prompt_key

        problems = [("bad labels", find_problem(label=label)), ("bad captions", find_problem(caption=caption))]
        problems.append(("bad probabilities", find_problem(probability=probability)))
        for column, (size, _, problem) in zip((self.args.image_0_column, self.args.image_1_column), images):
            problems.append(("unreadable images", problem and f"{column}: {problem}"))
            if size is not None:
                self.sizes[size] += 1
                if min(size) < self.args.resolution:
                    self.findings["small images"].append(f"row {row}, {column}: {size[0]}x{size[1]}")
        for kind, problem in problems:
            if problem is not None:
                self.findings[kind].append(f"row {row}, {problem}")

        self.num_ties += label == 0.5
        if label not in (0, 1):
            return
        self.num_pairs += 1
        if caption is not None:
            self.captions.setdefault(caption, row)
            prompt = self.prompts.setdefault(same_prompt_key(caption), len(self.prompts))
            if not caption.strip():
                self.findings["empty captions"].append(f"row {row}")
        if all(problem is None for _, problem in problems):
            digests = [digest for _, digest, _ in images]
            names = digests if None in uids else [digest_of(str(uid).encode()) for uid in uids]
            if digests[0] == digests[1] or names[0] == names[1]:
                self.findings["identical images"].append(f"row {row}")
            else:
                self.pairs.append((row, prompt, *(names if label == 1 else names[::-1])))


def inspect_rows(args, dataset):
    """
    Yields each row's label, caption and what `inspect_image` returns for its two images. A tie has no images here, since
    training does not open them. `--num_proc` threads decode a bounded number of rows ahead.
    """

    def inspect(row):
        label, columns = row[args.label_column], [args.image_0_column, args.image_1_column]
        images = [inspect_image(row[column], args) for column in columns] if label != 0.5 else []
        return label, row[args.caption_column], images

    with ThreadPoolExecutor(args.num_proc) as pool:
        yield from map_ahead(pool, inspect, dataset, 2 * args.num_proc)


def inspect_image(value, args=None):
    """
    Decodes an image, given as `encoded_bytes` takes it, by training's own reader. Returns its upright (width, height), a
    digest of its file and what is wrong with it. Any of them may be `None`.
    """
    from preference_pairs import one_line, read_image

    try:
        data = encoded_bytes(value, args)
        return read_image(data).size, digest_of(data), None
    except UnidentifiedImageError:
        problem = "not in an image format that PIL knows"
    except Exception as error:  # PIL's decoders raise many kinds
        problem = one_line(error) or type(error).__name__
    path = value.get("path") if isinstance(value, dict) else None
    named = path is None or value["bytes"] is not None or path[:20] in problem
    return None, None, problem if named else f"{one_line(path, 100)}: {problem}"


def find_repeats(pairs):
    """
    The rows of `pairs`, `(row, prompt, winner, loser)`, that say the same, those that say the opposite and those of the same
    images under other captions, in words, by kind.
    """
    pairs = pd.DataFrame(pairs, columns=["row", "prompt", "winner", "loser"])
    either_way, images = ["prompt", "first", "second"], ["first", "second"]
    pairs["first"], pairs["second"] = pairs[["winner", "loser"]].min(axis=1), pairs[["winner", "loser"]].max(axis=1)
    duplicates, contradictions, recurring = [], [], []
    for _, same_images in pairs[pairs.duplicated(either_way, keep=False)].groupby(either_way, sort=False):
        verdicts = [", ".join(map(str, rows)) for _, rows in same_images.groupby("winner", sort=False)["row"]]
        duplicates.extend(f"rows {rows}" for rows in verdicts if "," in rows)
        if len(verdicts) == 2:
            contradictions.append(f"rows {verdicts[0]} against {verdicts[1]}")
    once = pairs.drop_duplicates(either_way)
    for _, same_images in once[once.duplicated(images, keep=False)].groupby(images, sort=False):
        recurring.append(f"rows {', '.join(map(str, same_images['row']))}")
    return {"duplicate pairs": duplicates, "contradicting pairs": contradictions, "recurring pairs": recurring}


def read_columns(args, names):
    """The values of those of these columns that the dataset has, by name."""
    if args.train_data_dir is not None:
        # Line by line, as in training: columns that training does not read may mix types.
        text = Path(args.train_data_dir, "metadata.jsonl").read_text(encoding="utf-8-sig")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return {name: [row.get(name) for row in rows] for name in names if any(name in row for row in rows)}
    rows = load_rows(args, flags_of(args, "label_column"))
    names = [name for name in names if name in rows.features]
    tables = list(rows.select_columns(names).iter(METADATA_BATCH_SIZE)) if names else []
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in names}


def read_sources(labels, columns):
    """The sources of each pair's `(winner, loser)`, if the data have them. `columns` are what `read_columns` returns."""
    if not columns.keys() >= {"model_0", "model_1"}:
        return []
    unknown = [None] * len(labels)
    sides = [
        map(name_source, columns[f"model_{side}"], columns.get(f"lora_weights_{side}", unknown)) for side in (0, 1)
    ]
    return [pair if label == 1 else pair[::-1] for label, *pair in zip(labels, *sides) if label in (0, 1)]


def load_tokenizer(args):
    """The model's tokenizer and how many tokens of a caption the model takes; without a model, twice `None`."""
    if args.pretrained_model_name_or_path is None:
        return None, None
    from transformers import CLIPTextConfig, CLIPTokenizer

    name = args.pretrained_model_name_or_path
    model = {"pretrained_model_name_or_path": name, "revision": args.revision}
    try:
        if os.path.isdir(name):
            # transformers makes up what a folder lacks.
            for file in ("tokenizer/tokenizer_config.json", "text_encoder/config.json"):
                os.stat(os.path.join(name, file))
        tokenizer = CLIPTokenizer.from_pretrained(**model, subfolder="tokenizer")
        limit = CLIPTextConfig.from_pretrained(**model, subfolder="text_encoder").max_position_embeddings
    except (OSError, ValueError) as error:
        raise ValueError(f"--pretrained_model_name_or_path {name}, its tokenizer and text encoder: {error}") from error
    # Some tokenizers have no limit of their own.
    return tokenizer, min(limit, tokenizer.model_max_length)


def print_report(args, counts, findings, sizes, max_tokens):
    """Prints the table, then the first `--max_listed` findings of every kind."""
    kinds = {
        **ERRORS,
        "empty captions": "trained on as they are",
        "long captions": f"prompts of more than {max_tokens} tokens, which are cut off",
        "small images": f"shorter side below {args.resolution} (--resolution): enlarged",
        "identical images": "both images of the pair are the same",
        "duplicate pairs": "the same prompt, images and preference in more than one row",
        "contradicting pairs": "the same prompt and images with opposite preferences",
        "recurring pairs": "the same two images under other captions",
    }
    for name, (count, meaning) in counts.items():
        print(f"{name:<20} {count:>11,}{meaning}")
    for kind, meaning in kinds.items():
        if kind == "long captions" and max_tokens is None:
            print(f"{kind:<20} {'not checked':>11}  give --pretrained_model_name_or_path, whose tokenizer counts")
        else:
            print(f"{kind:<20} {len(findings[kind]):>11,}  {meaning}")
    if sizes:
        for name, side in (("width", 0), ("height", 1)):
            lengths = np.repeat([size[side] for size in sizes], list(sizes.values()))
            extent = f"{lengths.min()} / {np.median(lengths):.0f} / {lengths.max()}"
            print(f"{name:<20} {extent}  (min / median / max)")
        common = [f"{width}x{height} ({count:,})" for (width, height), count in sizes.most_common(5)]
        print(f"{'most common sizes':<20} {', '.join(common)}")
    for kind in kinds:
        if findings[kind]:
            print(f"\n{kind}:", *findings[kind][: args.max_listed], sep="\n  ")
        if (more := len(findings[kind]) - args.max_listed) > 0:
            print(f"  and {more:,} more (--max_listed)")
    print()


# filter


def filter_pairs(args):
    """Keeps the pairs won by an absolute winner of its prompt and writes their rows and metadata to `--output_file`."""
    if os.path.exists(args.output_file):
        raise ValueError(f"--output_file {args.output_file} exists; give a new file")
    table, comparisons = read_comparisons(args)
    own = comparisons["image_0"] == comparisons["image_1"]
    decided = comparisons[(comparisons["label"] != 0.5) & ~own]
    print(f"{len(comparisons):,} rows, {(comparisons['label'] == 0.5).sum():,} of them ties")
    if own.any():
        print(f"{own.sum():,} rows, the first is row {own.idxmax()}, have the same image twice and are left out")

    print(f"{'pairs kept':>12} {'prompts':>11}  by")
    for min_wins, losers in sorted({*itertools.product((1, 2), ("all", "latest")), (args.min_wins, args.losers)}):
        rows = absolute_winner_rows(comparisons[~own], min_wins, losers, args.max_pairs_per_prompt)
        if (min_wins, losers) == (args.min_wins, args.losers):
            kept = rows
        num_prompts = comparisons["prompt"][rows].nunique()
        print(f"{len(rows):12,} {num_prompts:11,}  --min_wins {min_wins} --losers {losers}")
    if len(decided) and count_pairs_per_prompt(decided).max() == 1:
        print(
            "No prompt has more than one pair: --min_wins 1 keeps every pair, and more keeps none. Filtering cannot help."
        )
    if len(kept) == 0:
        raise ValueError(f"no pair is left: no winner of --min_wins {args.min_wins} pairs neither lost nor drew one")
    os.makedirs(os.path.dirname(os.path.abspath(args.output_file)), exist_ok=True)
    # An earlier filter may have written a column `row`.
    metadata = table.select([name for name in table.column_names if name != "row"])
    with whole_file(args.output_file) as incomplete:
        pq.write_table(metadata.take(kept).add_column(0, "row", pa.array(kept)), incomplete)
    before = f"{len(decided):,} pairs / {decided['prompt'].nunique():,} prompts"
    print(f"{before} -> {len(kept):,} / {comparisons['prompt'][kept].nunique():,}")
    print(f"row ids and metadata of the kept pairs are in {args.output_file}")
    return 0


def read_comparisons(args):
    """
    The metadata of all rows, and a `pd.DataFrame` of the comparisons: `label` is 1, 0 or 0.5 (a tie), `prompt`, `image_0`
    and `image_1` are numbers that tell prompts and images apart, and a larger `order` is a later pair.
    """
    from preference_pairs import same_prompt_key

    names = flags_of(args, "label_column", "caption_column", "order_column")
    rows = load_rows(args, names)
    uids = flags_of(args, "image_0_uid_column", "image_1_uid_column")
    if not uids and rows.features.keys() >= set(UID_COLUMNS):
        uids = dict(zip(("--image_0_uid_column", "--image_1_uid_column"), UID_COLUMNS))
    require_columns(uids, rows.features, args.train_data_dir or args.dataset_name)
    if len(uids) == 1:
        raise ValueError(
            f"{list(uids)[0]} is given alone; give --image_0_uid_column and --image_1_uid_column, or neither"
        )
    names |= uids
    tables = list(rows.iter(METADATA_BATCH_SIZE))
    if not tables:
        raise ValueError("the dataset has no rows")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"--dataset_name {args.dataset_name}: columns of its files differ in type: {error}"
        ) from error

    for flag, name in names.items():
        if pa.types.is_nested(table[name].type):
            raise ValueError(f"column {name} ({flag}) is of type {table[name].type}; filtering needs single values")
        if len(missing := np.flatnonzero(table[name].is_null(nan_is_null=True).to_numpy())):
            raise ValueError(f"row {missing[0]}: {name} ({flag}) is null or NaN; filtering needs it in every row")
    label = table[args.label_column].to_pandas()
    if len(wrong := np.flatnonzero(~label.isin([0, 0.5, 1]))):
        raise ValueError(f"row {wrong[0]}: {args.label_column} (--label_column) is not 1, 0 or 0.5: {label[wrong[0]]}")
    caption, captions = pd.factorize(table[args.caption_column].to_pandas())
    prompt = pd.factorize(np.array([same_prompt_key(text) for text in captions]))[0][caption]
    images = [table[name].to_pandas() for name in uids.values()] or read_digests(args, len(table))
    image_0, image_1 = np.split(pd.factorize(pd.concat(images))[0], 2)
    order = np.arange(len(table)) if args.order_column is None else table[args.order_column].to_pandas()
    columns = {"label": label, "prompt": prompt, "image_0": image_0, "image_1": image_1, "order": order}
    return table, pd.DataFrame(columns)


def read_digests(args, num_rows):
    """The digests of the contents of all images: a `pd.Series` of image 0's and one of image 1's."""
    columns = [args.image_0_column, args.image_1_column]
    rows = load_rows(args, {}, flags_of(args, "image_0_column", "image_1_column"))
    source, digests = find_image_source(args), [[], []]
    for number, row in enumerate(tqdm(iter_rows(rows), total=num_rows, unit=" rows", desc="reading images")):
        for column, found in zip(columns, digests):
            try:
                found.append(digest_of(encoded_bytes(row[column], source)))
            except (OSError, ValueError) as error:
                raise ValueError(f"row {number}: {column} cannot be read: {error}") from error
    return [pd.Series(found) for found in digests]


def count_pairs_per_prompt(comparisons):
    """How many different pairs of images each prompt has, in a `pd.Series`."""
    images = np.sort(comparisons[["image_0", "image_1"]].to_numpy(), axis=1)
    pairs = pd.DataFrame({"prompt": comparisons["prompt"].to_numpy(), "first": images[:, 0], "second": images[:, 1]})
    return pairs.drop_duplicates().groupby("prompt").size()


def absolute_winner_rows(comparisons, min_wins, losers, max_pairs_per_prompt):
    """
    The rows, ascending, whose winner never lost or drew under its prompt and won `min_wins` different pairs or more
    (section 5 of the paper). Of rows that say the same, the first is kept. `losers` is "all" or "latest", the row of the
    largest order. `max_pairs_per_prompt` keeps those whose winners won most pairs, then the earlier rows.
    """
    # An image is judged under each of its prompts by itself, so each gets a number there.
    num_images = comparisons[["image_0", "image_1"]].to_numpy().max(initial=0) + 1
    image_0, image_1 = (comparisons["prompt"] * num_images + comparisons[name] for name in ("image_0", "image_1"))
    is_tie, first_wins = comparisons["label"] == 0.5, comparisons["label"] == 1
    pairs = comparisons[["prompt", "order"]].assign(
        winner=image_0.where(first_wins, image_1), loser=image_1.where(first_wins, image_0)
    )
    lost_or_drew = pd.concat([pairs["loser"], pairs["winner"][is_tie]])
    pairs = pairs[~is_tie & ~pairs["winner"].isin(lost_or_drew)]
    wins = pairs.drop_duplicates(["winner", "loser"]).groupby("winner").size()
    pairs = pairs.assign(wins=pairs["winner"].map(wins))
    pairs = pairs[pairs["wins"] >= min_wins]
    if losers == "latest":
        pairs = pairs.sort_values("order", kind="stable").drop_duplicates("winner", keep="last")
    pairs = pairs.sort_index().drop_duplicates(["winner", "loser"])
    if max_pairs_per_prompt is not None:
        pairs = pairs.sort_values("wins", ascending=False, kind="stable").groupby("prompt").head(max_pairs_per_prompt)
    return np.sort(pairs.index.to_numpy())


# convert


class Skipped(Counter):
    """How many items a conversion leaves out, by reason. The log names each item."""

    def add(self, item, reason, detail=None):
        logger.warning(f"skipped {item}: {detail or reason}")
        self[reason] += 1


def convert(args):
    """Writes the pairs that `args.read_candidates` finds as a folder of parquet files that the trainers read."""
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; give a new folder")
    skipped = Skipped()
    features, candidates = args.read_candidates(args, skipped)
    with logging_redirect_tqdm():
        pairs = tqdm(read_images(args, candidates, skipped), unit=" pairs", desc="convert")
        num_pairs, num_files = write_shards(pairs, features, args.output_dir, args.max_shard_size_mb << 20)
    print(f"{num_pairs:,} pairs in {num_files:,} files in {args.output_dir}")
    for reason, count in skipped.most_common():
        print(f"skipped {count:,}: {reason}")
    return 0


def read_images(args, candidates, skipped):
    """Turns (item, pair with images as `encoded_bytes` takes them) into pairs with encoded images, or skips them."""
    from preference_pairs import find_problem

    source = find_image_source(args)
    for item, pair in candidates:
        if problem := find_problem(label=pair["label_0"]):
            skipped.add(item, "no label", problem)
            continue
        if problem := find_problem(caption=pair["caption"]):
            skipped.add(item, "no caption", problem)
            continue
        try:
            images = {name: {"bytes": encoded_bytes(pair[name], source), "path": None} for name in ("jpg_0", "jpg_1")}
        except (OSError, ValueError) as error:
            skipped.add(item, "an image cannot be read", str(error))
            continue
        yield {**pair, **images, "label_0": float(pair["label_0"])}


def make_pair(winner, loser, caption):
    """A pair of the schema whose image 0 is the winner."""
    return {"jpg_0": winner, "jpg_1": loser, "label_0": 1.0, "caption": caption}


def read_pairs(args, skipped):
    """`convert pairs`: a chosen and a rejected image in each row."""
    rows = load_rows(args, flags_of(args, "caption_column"), flags_of(args, "chosen_column", "rejected_column"))
    candidates = (
        (f"row {index}", make_pair(row[args.chosen_column], row[args.rejected_column], row[args.caption_column]))
        for index, row in enumerate(iter_rows(rows))
    )
    return SCHEMA, candidates


def read_rankings(args, skipped):
    """`convert rankings`: several images of a prompt with their ranks, all in one row or each in its own."""
    columns, images = flags_of(args, "caption_column", "rank_column", "group_column"), flags_of(args, "image_column")
    rows = load_rows(args, columns, images)
    if isinstance(rows.features[args.image_column], LISTS):
        rankings = rankings_in_rows(rows, args, skipped)
    else:
        rankings = rankings_across_rows(load_rows(args, columns, images, in_place=False), args, skipped)
    return SCHEMA, pair_rankings(rankings, args, skipped)


def rankings_in_rows(rows, args, skipped):
    """Yields (name, caption, [(name, rank, image), ...]) from rows with a list of images and a list of ranks."""
    for index, row in enumerate(iter_rows(rows)):
        images, ranks = row[args.image_column], row[args.rank_column]
        if not isinstance(images, list) or not isinstance(ranks, list) or len(images) != len(ranks):
            skipped.add(f"row {index}", "the row has no list of images with a list of as many ranks")
        elif row[args.caption_column] is None:
            skipped.add(f"row {index}", f"{args.caption_column} is null")
        else:
            names = [f"row {index}, image {position}" for position in range(len(images))]
            yield f"row {index}", row[args.caption_column], list(zip(names, ranks, images))


def rankings_across_rows(rows, args, skipped):
    """Yields (name, caption, [(name, rank, image), ...]) from rows with one image each, in any order."""
    group_column = args.group_column or args.caption_column
    groups = {}  # group -> (caption, [(row, rank), ...])
    columns = [*dict.fromkeys([group_column, args.caption_column, args.rank_column])]
    for index, row in enumerate(iter_rows(rows.select_columns(columns))):
        group, caption = row[group_column], row[args.caption_column]
        if caption is None or group is None:
            skipped.add(f"row {index}", f"{args.caption_column if caption is None else group_column} is null")
        elif groups.setdefault(group, (caption, []))[0] != caption:
            skipped.add(f"row {index}", "its caption is not that of its group's first row")
        else:
            groups[group][1].append((index, row[args.rank_column]))
    for group, (caption, members) in groups.items():
        ranking = [(f"row {index}", rank, rows[index][args.image_column][0].as_py()) for index, rank in members]
        yield f"the ranking of {group!r:.80}", caption, ranking


def pair_rankings(rankings, args, skipped):
    """Yields the pairs that `--pairs` makes of each ranking."""
    for ranking_name, caption, ranking in rankings:
        ranked = []
        for name, rank, image in ranking:
            if isinstance(rank, (int, float)) and not np.isnan(rank):
                ranked.append((name, rank, image))
            else:
                skipped.add(name, "no rank", f"the rank is {rank!r:.80}; it must be a number")
        pairs = pair_ranks([rank for _, rank, _ in ranked], args.pairs, args.higher_is_better)
        if not pairs:
            skipped.add(ranking_name, "no two images of different ranks")
        for winner, loser in pairs:
            name = f"{ranked[winner][0]}, against {ranked[loser][0]}"
            yield name, make_pair(ranked[winner][2], ranked[loser][2], caption)


def read_folders(args, skipped):
    """`convert folders`: images of the same names in two folders, captions in text files beside the winners."""
    winners, losers = (
        find_images(folder, lambda path: path.relative_to(folder).with_suffix(""), skipped, args.caption_extension)
        for folder in (args.winners, args.losers)
    )

    def candidates():
        for name in sorted(winners.keys() | losers.keys()):
            if name not in losers:
                skipped.add(winners[name], "no loser of this name")
            elif name not in winners:
                skipped.add(losers[name], "no winner of this name")
            else:
                caption_file = Path(f"{winners[name].with_suffix('')}{args.caption_extension}")
                try:
                    if leads_out(caption_file, args.winners):
                        raise ValueError(LEADS_OUT)
                    caption = " ".join(caption_file.read_text(encoding="utf-8-sig").split())
                except (OSError, ValueError) as error:
                    skipped.add(winners[name], "its caption file cannot be read", f"{caption_file}: {error}")
                else:
                    yield winners[name], make_pair(winners[name], losers[name], caption)

    return SCHEMA, candidates()


LEADS_OUT = "a link that leads out of the folder"


def leads_out(path, folder):
    return not path.resolve().is_relative_to(Path(folder).resolve())


def find_images(folder, name_of, skipped, caption_extension=None):
    """
    `{name_of(path): path}` of the images below a folder. Links that lead out of it are skipped, as in training. With
    `caption_extension`, files that are neither images nor captions are named as skipped.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder")

    def stop(error):
        raise error

    paths = []
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        found = [Path(parent, name) for name in (*folders, *files)]
        outside = {path.name for path in found if leads_out(path, folder)}
        for name in sorted(outside):
            skipped.add(Path(parent, name), LEADS_OUT)
        folders[:] = [name for name in folders if name not in outside]
        paths += [Path(parent, name) for name in files if name not in outside]
    images = {}
    for path in sorted(paths):
        if path.name.lower().endswith(IMAGE_EXTENSIONS):
            if (other := images.setdefault(name_of(path), path)) != path:
                raise ValueError(f"{other} and {path} have the same name; keep one of them")
        elif caption_extension is not None and not path.name.endswith(caption_extension):
            skipped.add(path, "not an image, by its extension")
    return images


def read_pick_a_pic(args, skipped):
    """`convert pick_a_pic`: metadata with the uids of images that are kept elsewhere. Ties stay, since `filter` needs them."""
    uid_columns = flags_of(args, "image_0_uid_column", "image_1_uid_column")
    rows = load_rows(args, {**flags_of(args, "label_column", "caption_column"), **uid_columns})
    find_image = image_finder(args, skipped)
    metadata = metadata_features(rows.features, args)

    def candidates():
        for index, row in enumerate(iter_rows(rows)):
            images = [find_image(str(row[column])) for column in uid_columns.values()]
            missing = [str(row[column]) for column, image in zip(uid_columns.values(), images) if image is None]
            if missing:
                skipped.add(f"row {index}", "no image of this uid", f"no image of uid {' and '.join(missing)}")
                continue
            pair = {"jpg_0": images[0], "jpg_1": images[1], **{name: row[name] for name in metadata}}
            yield f"row {index}", {**pair, "label_0": row[args.label_column], "caption": row[args.caption_column]}

    return Features({**SCHEMA, **metadata}), candidates()


def image_finder(args, skipped):
    """A function from a uid to its image in `--images_dir` or `--images_dataset`, or to `None`."""
    if (args.images_dir is None) == (args.images_dataset is None):
        raise ValueError("give either --images_dir or --images_dataset, and not both")
    if args.images_dir is not None:
        return find_images(args.images_dir, lambda path: path.stem, skipped).get
    images = open_dataset(args.images_dataset, None, args.images_split_name, args.cache_dir, in_place=False)
    columns = flags_of(args, "uid_column", "image_column")
    require_columns(columns, images.features, f"--images_dataset {args.images_dataset}")
    positions = {str(uid): position for position, uid in enumerate(images.data[args.uid_column].to_pylist())}
    return lambda uid: images[positions[uid]][args.image_column][0].as_py() if uid in positions else None


def metadata_features(features, args):
    """The features that a conversion keeps in addition to the schema's."""
    ours = {*SCHEMA, args.label_column, args.caption_column}
    return {name: feature for name, feature in features.items() if name not in ours and not holds_images(feature)}


def read_kept_rows(args, skipped):
    """`convert rows`: the rows that `filter` kept, with their images."""
    try:
        kept = pq.read_table(args.rows_file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"--rows_file {args.rows_file} cannot be read as a parquet file: {error}") from error
    columns = flags_of(args, "label_column", "caption_column")
    require_columns({"--rows_file": "row", **columns}, kept.column_names, args.rows_file)
    kept = kept.sort_by("row")
    rows = load_rows(args, columns, flags_of(args, "image_0_column", "image_1_column"))
    numbers = kept["row"].to_pylist()
    if isinstance(rows, Dataset):
        numbers = [number for number in numbers if number < len(rows)]
    rows = iter_rows(rows.select(numbers))
    metadata = metadata_features(Features.from_arrow_schema(kept.schema), args)

    def candidates():
        for batch in kept.to_batches(max_chunksize=1000):
            for entry in batch.to_pylist():
                row = next(rows, None)
                where = f"row {entry['row']} of {args.rows_file}"
                if row is None:
                    raise ValueError(f"{where} is beyond the end of the dataset")
                for column in columns.values():
                    if row[column] != entry[column]:
                        raise ValueError(
                            f"{where} has {column} {entry[column]!r:.80}, but the dataset {row[column]!r:.80}; it and "
                            "its split must be those that `filter` read"
                        )
                pair = {"jpg_0": row[args.image_0_column], "jpg_1": row[args.image_1_column]}
                pair.update(label_0=row[args.label_column], caption=row[args.caption_column])
                yield f"row {entry['row']}", {**pair, **{name: entry[name] for name in metadata}}

    return Features({**SCHEMA, **metadata}), candidates()


# Command line


def shared_flags(*flags, **columns):
    """A parent parser with flags `(name, default, help)` and flags of columns, `name=(default, what it holds)`."""
    parent = ArgumentParser(add_help=False)
    flags += tuple((name, default, f"Column of {meaning}.") for name, (default, meaning) in columns.items())
    for name, default, text in flags:
        parent.add_argument(f"--{name}", default=default, help=text)
    return parent


def parse_args(input_args=None):
    source = shared_flags(
        ("dataset_name", None, "Hub id or local folder of parquet files. Not for check: a local parquet file."),
        ("dataset_config_name", None, "Configuration of the dataset, if it has several."),
        ("dataset_split_name", "train", "Split of the dataset."),
        (
            "train_data_dir",
            None,
            "Folder of images with a metadata.jsonl, where x_file_name gives the files of column x.",
        ),
        ("cache_dir", None, "Where `datasets` keeps what it downloads or copies."),
    )
    images = shared_flags(image_0_column=("jpg_0", "image 0"), image_1_column=("jpg_1", "image 1"))
    uids = shared_flags(
        image_0_uid_column=("image_0_uid", "image 0's id"), image_1_uid_column=("image_1_uid", "image 1's id")
    )
    help = "Default: image_0_uid and image_1_uid if there are such columns, else images are compared by content."
    optional_uids = shared_flags(
        ("image_0_uid_column", None, f"Column of image 0's id. {help}"),
        ("image_1_uid_column", None, "Column of image 1's id."),
    )
    labels = shared_flags(
        label_column=("label_0", "the label, 1: image 0 wins, 0: image 1 wins, 0.5: a tie"),
        caption_column=("caption", "the caption"),
    )
    prompts = shared_flags(caption_column=("prompt", "the caption"))
    output = ArgumentParser(add_help=False)
    output.add_argument("--output_dir", required=True, help="New folder for the parquet files.")
    output.add_argument("--max_shard_size_mb", type=COUNT, default=500, help="MiB of a parquet file.")

    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(metavar="check | filter | convert", required=True)

    help = "Report what training would meet."
    command = add_command(commands, __doc__, "check", help, parents=[source, images, labels])
    command.set_defaults(command=check)
    add = command.add_argument
    add("--preference_probability_column", help="Column of the probability that image 0 wins, if training reads one.")
    add("--pretrained_model_name_or_path", help="Model whose tokenizer says which captions are too long.")
    add("--revision", help="Revision of the model.")
    add("--resolution", type=COUNT, default=512, help="Images smaller than this are named.")
    threads = min(os.cpu_count(), 16)
    add("--num_proc", type=COUNT, default=threads, help="Threads that decode images.")
    add("--max_listed", type=COUNT, default=20, help="Findings of each kind that are named.")

    help = "Keep the pairs won by an absolute winner of its prompt: an image that neither lost nor drew."
    command = add_command(commands, __doc__, "filter", help, parents=[source, images, optional_uids, labels])
    command.set_defaults(command=filter_pairs)
    add = command.add_argument
    add("--output_file", required=True, help="Parquet file for the kept rows, for `convert rows`.")
    help = "Different pairs that a winner must have won under its prompt. The authors' code has 1, the paper 2."
    add("--min_wins", type=COUNT, default=1, help=help)
    help = "Keep a winner's pairs with all its losers, or the latest of them, by row."
    add("--losers", choices=["all", "latest"], default="all", help=help)
    add("--order_column", help="Column that `latest` goes by instead of the row, such as created_at.")
    help = "Keep at most this many pairs of each prompt: those whose winners won most often, then the earlier rows."
    add("--max_pairs_per_prompt", type=COUNT, help=help)

    command = add_command(commands, __doc__, "convert", "Make a dataset that the trainers read.")
    sources = command.add_subparsers(metavar="pairs | rankings | folders | pick_a_pic | rows", required=True)

    def add_conversion(name, read_candidates, help, *parents):
        conversion = add_command(sources, __doc__, f"convert {name}", help, parents=[*parents, output])
        conversion.set_defaults(command=convert, read_candidates=read_candidates)
        return conversion.add_argument

    chosen = shared_flags(chosen_column=("chosen", "the winner"), rejected_column=("rejected", "the loser"))
    add_conversion("pairs", read_pairs, "From columns of chosen and rejected images.", source, prompts, chosen)

    ranked = shared_flags(image_column=("image", "the image or images"), rank_column=("rank", "the rank or ranks"))
    help = "From several ranked images per prompt: one row per image, or a row with lists of images and ranks."
    add = add_conversion("rankings", read_rankings, help, source, prompts, ranked)
    add("--higher_is_better", action="store_true", help="The ranks are scores. Without this flag, 1 is the best.")
    add("--group_column", help="Column that tells rankings of the same prompt apart. Default: the caption's column.")
    help = "Every two of different ranks, the best against the worst, or each rank against the next."
    add("--pairs", choices=["all", "best_worst", "adjacent"], default="all", help=help)

    add = add_conversion(
        "folders", read_folders, "From two folders of images with the same names, captions in text files."
    )
    add("--winners", required=True, help="Folder of the winners, with the captions.")
    add("--losers", required=True, help="Folder of the losers.")
    add("--caption_extension", default=".txt", help="Extension of the caption files.")

    kept_elsewhere = shared_flags(
        ("images_dir", None, "Folder of images named by their uids, sub-folders included."),
        ("images_dataset", None, "Hub id, local folder or parquet file with uids and images."),
        ("images_split_name", "train", "Its split."),
        uid_column=("uid", "its uids"),
        image_column=("image", "its images"),
    )
    help = "From Pick-a-Pic metadata, or what `filter` kept of it, and images kept elsewhere."
    add_conversion("pick_a_pic", read_pick_a_pic, help, source, uids, labels, kept_elsewhere)

    help = "From the rows that `filter` kept and their dataset."
    add = add_conversion("rows", read_kept_rows, help, source, images, labels)
    add("--rows_file", required=True, help="What `filter` wrote.")

    return parser.parse_args(input_args)


def main(args):
    return args.command(args)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    run(main, parse_args)
