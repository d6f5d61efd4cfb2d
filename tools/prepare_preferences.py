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
Check, filter and convert preference pairs for `train_ncp_dpo_sd15.py` and `train_ncp_dpo_sdxl.py`.

The trainers read four columns: `jpg_0` and `jpg_1` (encoded images), `label_0` (1: image 0 wins, 0: image 1 wins, 0.5:
a tie, left out) and `caption`. They come from a hub id or a local folder of parquet files (`--dataset_name`), or from
a folder of images whose `metadata.jsonl` gives `jpg_0_file_name`, `jpg_1_file_name`, `label_0` and `caption`
(`--train_data_dir`). Rows are counted from 0.

Read a dataset once and say what training would trip over; exit code 1 if it would stop, 2 if nothing can be read:

    python prepare_preferences.py check --dataset_name my_pairs --pretrained_model_name_or_path MODEL
    python prepare_preferences.py check --train_data_dir my_images --resolution 1024

Keep the pairs won by an absolute winner of its prompt, from the metadata alone, then make a dataset of those rows:

    python prepare_preferences.py filter --dataset_name pick_a_pic --min_wins 2 --losers latest --output_file kept.parquet
    python prepare_preferences.py convert rows --rows_file kept.parquet --dataset_name pick_a_pic --output_dir filtered

Turn other shapes into the trainers':

    # columns `prompt`, `chosen` and `rejected`
    python prepare_preferences.py convert pairs --dataset_name trl_pairs --output_dir my_pairs
    # ranked images of each prompt, one in a row, or a list of images and a list of ranks in a row
    python prepare_preferences.py convert rankings --dataset_name ranked --pairs best_worst --output_dir my_pairs
    # two folders of same-named images, captions in .txt files beside the winners
    python prepare_preferences.py convert folders --winners better --losers worse --output_dir my_pairs
    # Pick-a-Pic metadata, or what `filter` kept of it, and images that are kept elsewhere under their uids
    python prepare_preferences.py convert pick_a_pic --dataset_name kept.parquet --images_dir images --output_dir my_pairs

Parquet files are read in order where they are, so that their size does not matter. Where rows are needed in another
order (rankings with one image in a row, `--images_dataset`), and for `check` of a hub id, as for training, `datasets`
keeps a copy under `--cache_dir`. `convert` copies the encoded images as they are, without decoding them, and names
whatever it skips: run `check` on what it wrote.
"""

import argparse
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, load_dataset, load_dataset_builder
from datasets.table import table_cast
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


logger = logging.getLogger("prepare_preferences")

SCHEMA = Features(
    {
        "jpg_0": datasets.Image(),
        "jpg_1": datasets.Image(),
        "label_0": Value("float64"),
        "caption": Value("string"),
    }
)
IMAGE_EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
READ_BATCH_SIZE, INSPECT_BATCH_SIZE = 32, 8  # rows held with their images: they bound the memory
METADATA_BATCH_SIZE = 100_000
ROW_GROUP_SIZE, ROW_GROUP_BYTES = 100, 64 << 20  # readers of a parquet file hold a row group in memory


# ---- Reading --------------------------------------------------------------------------------------------------------


def load_rows(args, columns, image_columns=None, in_place=True):
    """
    Open `--dataset_name` or `--train_data_dir`. Encoded images stay encoded.

    Args:
        args (`argparse.Namespace`): the flags that say where the data are.
        columns (`dict`): flag -> name of the columns that must be there.
        image_columns (`dict`, *optional*):
            flag -> name of the image columns that must be there. With them, the rows have just these columns and
            `columns`; without them, every column that holds no image, and no image data is read from the disk.
        in_place (`bool`): see `open_dataset`.

    Returns:
        What `open_dataset` does; for the images of an image folder, a list of rows.

    Raises:
        ValueError: for both or neither of the two flags, for data that cannot be opened, and for a missing column.
    """
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("give either --dataset_name or --train_data_dir, and not both")
    image_columns = image_columns or {}

    if args.train_data_dir is not None:
        rows = read_image_folder(args.train_data_dir, image_columns.values())
        if rows:
            file_names = {flag: f"{name}_file_name" for flag, name in image_columns.items()}
            check_columns(columns | file_names, set().union(*rows), f"{args.train_data_dir}/metadata.jsonl")
        if image_columns:
            return rows
        try:
            return Dataset.from_pandas(pd.DataFrame(rows)).with_format("arrow")
        except pa.ArrowException as error:
            raise ValueError(f"{args.train_data_dir}/metadata.jsonl mixes types in a column: {error}") from error

    dataset = open_dataset(
        args.dataset_name, args.dataset_config_name, args.dataset_split_name, args.cache_dir, in_place
    )
    check_columns(columns | image_columns, dataset.column_names, f"--dataset_name {args.dataset_name}")
    if image_columns:
        wanted = list(dict.fromkeys([*image_columns.values(), *columns.values()]))
    else:
        wanted = [name for name, feature in dataset.features.items() if not holds_images(feature)]
    return dataset.select_columns(wanted)


def open_dataset(name, config_name, split, cache_dir, in_place):
    """
    Open a hub id, a local folder or a local parquet file.

    Args:
        in_place (`bool`): read parquet files in order where they are, instead of copying them to the cache.

    Returns:
        `ParquetFiles`, or a `datasets.Dataset` in arrow format, whose rows can be read in any order.
    """
    if not os.path.exists(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"{name} does not exist; a hub id, a folder of parquet files or a parquet file is needed")
    if os.path.isfile(name):
        path, config = "parquet", {"data_files": {split: name}}
    else:
        path, config = name, {"name": config_name}
    try:
        data_files = load_dataset_builder(path, cache_dir=cache_dir, **config).config.data_files or {}
        if data_files and split.isidentifier() and split not in data_files:
            # Or else all splits would be copied before anything is said.
            raise ValueError(f"its splits (--dataset_split_name) are {', '.join(map(str, data_files))}")
        files = data_files.get(split, [])
        if in_place and files and all(file.endswith(".parquet") for file in files):
            return ParquetFiles(files)
        return load_dataset(path, split=split, cache_dir=cache_dir, **config).with_format("arrow")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"cannot load {name}, split {split}: {error}") from error


class ParquetFiles:
    """
    The rows of parquet files, read in order from where they are, on the disk or on the hub: the part of
    `datasets.Dataset` that the commands need.

    `datasets`' own streaming reads ahead without a bound, and its scanner's threads can abort Python when it exits
    (https://github.com/huggingface/datasets/issues/7566), which would falsify the exit code.
    """

    def __init__(self, files, column_names=None):
        self.files = files
        with fsspec.open(files[0], "rb") as file:
            features = Features.from_arrow_schema(pq.read_schema(file))
        self.all_names = set(features)
        self.column_names = column_names or list(features)
        self.features = Features({name: features[name] for name in self.column_names})

    def select_columns(self, column_names):
        return ParquetFiles(self.files, column_names)

    def iter(self, batch_size):
        for path in self.files:
            try:
                with fsspec.open(path, "rb") as file:
                    # Buffered: a row group of images may be larger than the memory.
                    parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
                    others = set(parquet.schema_arrow.names) - self.all_names
                    if others:
                        raise ValueError(f"it has {', '.join(sorted(others))}, which {self.files[0]} has not")
                    for batch in parquet.iter_batches(batch_size, columns=self.column_names):
                        # As for training: to the first file's types, null where a column is missing.
                        yield table_cast(pa.Table.from_batches([batch]), self.features.arrow_schema)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ValueError(f"{path}: {error}") from error

    @property
    def num_rows(self):
        local = [path for path in self.files if "://" not in path]
        try:
            return sum(pq.read_metadata(path).num_rows for path in local) or None
        except (OSError, pa.ArrowException):
            # Of a damaged file, which `iter` names.
            return None


def read_image_folder(folder, image_columns):
    """Rows of the folder's metadata.jsonl; each image column is what its `<column>_file_name` points to."""
    path = os.path.join(folder, "metadata.jsonl")
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; --train_data_dir needs it, with one JSON object per line")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = dict(json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
            for column in image_columns:
                row[column] = image_reference(row.get(f"{column}_file_name"), folder)
            rows.append(row)
    return rows


def image_reference(file_name, folder):
    """What `image_bytes` needs to read an image, or each of a list of images, that metadata.jsonl names."""
    if isinstance(file_name, list):
        return [image_reference(name, folder) for name in file_name]
    return {"bytes": None, "path": file_name, "folder": folder}


def check_columns(columns, available, where):
    """Raise a ValueError for the first of `columns` (flag -> name) that is not `available`."""
    for flag, name in columns.items():
        if name not in available:
            raise ValueError(
                f"{where} has no column {name!r} ({flag}); its columns are {', '.join(sorted(available))}"
            )


def holds_images(feature):
    """Whether a column of this feature holds images or other binary data."""
    if isinstance(feature, dict):
        return any(holds_images(value) for value in feature.values())
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return holds_images(feature.feature)
    return isinstance(feature, datasets.Image) or feature in (Value("binary"), Value("large_binary"))


def iter_rows(rows):
    """Yield what `load_rows` returned row by row, as dicts."""
    if isinstance(rows, list):
        yield from rows
    else:
        for table in rows.iter(batch_size=READ_BATCH_SIZE):
            yield from table.to_pylist()


def image_bytes(value):
    """
    The encoded bytes of an image given as bytes, as a path, as `datasets` stores it (`{"bytes", "path"}`), or by
    `image_reference`.

    Raises:
        ValueError, OSError: where there are none, with the reason.
    """
    if isinstance(value, dict):
        path = value.get("path")
        if "folder" in value:
            path = path_inside(value["folder"], path)
        value = path if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        value = Path(value).read_bytes()
    if not isinstance(value, bytes):
        raise ValueError(f"{describe(value)} instead of an image")
    if not value:
        raise ValueError("empty, 0 bytes")
    return value


def path_inside(folder, file_name):
    """The path of a file that metadata.jsonl names, which must lie in its folder, links resolved."""
    if not isinstance(file_name, str):
        raise ValueError(f"the file name is {describe(file_name)}; it must be text")
    path = Path(folder, file_name).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise ValueError(
            f"{file_name} leaves the folder; files must lie in {folder}, and their names be relative to it"
        )
    return str(path)


def describe(value):
    """A value of the wrong kind, in words."""
    return "null" if value is None else f"of type {type(value).__name__}"


def label_problem(label):
    """What is wrong with a label, or `None`."""
    if not isinstance(label, (int, float)):
        return f"the label is {describe(label)}; it must be 1, 0 or 0.5"
    if label not in (0, 0.5, 1):
        return f"the label is {label}; it must be 1, 0 or 0.5"


def caption_problem(caption):
    """What is wrong with a caption, or `None`; nothing is with an empty text."""
    if not isinstance(caption, str):
        return f"the caption is {describe(caption)}; it must be text"


# ---- check ----------------------------------------------------------------------------------------------------------


ERRORS = {
    "unreadable images": "training stops at one",
    "bad labels": "not 1, 0 or 0.5; training stops at one",
    "bad captions": "null or not text; training stops at one",
}


def check(args):
    """Read every row once, print a report, and return 1 if training would stop on the dataset, else 0."""
    if args.dataset_name is not None and os.path.isfile(args.dataset_name):
        raise ValueError(f"--dataset_name {args.dataset_name} is a file; for training give the folder that it is in")
    tokenizer = None if args.pretrained_model_name_or_path is None else load_tokenizer(args)
    image_columns = (args.image_0_column, args.image_1_column)
    rows = load_rows(
        args,
        {"--label_column": args.label_column, "--caption_column": args.caption_column},
        {"--image_0_column": args.image_0_column, "--image_1_column": args.image_1_column},
        in_place=args.streaming or os.path.exists(args.dataset_name or ""),
    )
    columns = (args.label_column, args.caption_column, *image_columns)
    num_rows = len(rows) if isinstance(rows, list) else rows.num_rows

    counts = Counter(rows=0, pairs=0, ties=0)
    findings = defaultdict(list)  # kind -> what was found, each naming its row
    sizes, captions, pairs = Counter(), {}, []
    inspected = tqdm(inspect_rows(rows, columns, args.num_proc), total=num_rows, unit=" rows", desc="check")
    for row, (label, caption, *images) in enumerate(inspected):
        problems = [("bad labels", label_problem(label)), ("bad captions", caption_problem(caption))]
        for column, (size, _, problem) in zip(image_columns, images):
            problems.append(("unreadable images", problem and f"{column}: {problem}"))
            if size is not None:
                sizes[size] += 1
                if min(size) < args.resolution:
                    findings["small images"].append(f"row {row}, {column}: {size[0]}x{size[1]}")
        problems = [(kind, problem) for kind, problem in problems if problem is not None]

        for kind, problem in problems:
            findings[kind].append(f"row {row}, {problem}")

        counts["rows"] += 1
        counts["ties"] += label == 0.5
        if label_problem(label) is not None or label == 0.5:
            continue
        counts["pairs"] += 1
        if isinstance(caption, str):
            prompt, _ = captions.setdefault(caption, (len(captions), row))
            if not caption.strip():
                findings["empty captions"].append(f"row {row}")
        if not problems:
            winner, loser = (digest for _, digest, _ in (images if label == 1 else reversed(images)))
            if winner == loser:
                findings["identical images"].append(f"row {row}")
            else:
                pairs.append((row, prompt, winner, loser))

    findings["duplicate pairs"], findings["contradicting pairs"] = find_repeats(pairs)
    max_tokens = None
    if tokenizer is not None:
        max_tokens, findings["long captions"] = find_long_captions(captions, tokenizer)
    counts["prompts"] = len(captions)
    print_report(counts, findings, sizes, max_tokens, args)

    errors = [f"{len(findings[kind]):,} {kind}" for kind in ERRORS if findings[kind]]
    if counts["pairs"] == 0:
        errors.append("no pair is left")
    print(f"Not fit for training: {', '.join(errors)}." if errors else "Fit for training.")
    return 1 if errors else 0


def inspect_rows(rows, columns, num_proc):
    """
    Yield each row's values of `columns` (label, caption and two images), the images replaced by what `inspect_image`
    says of them. Images are decoded in `num_proc` processes, to which a bounded number of rows is on its way.
    """
    values = ([row.get(column) for column in columns] for row in iter_rows(rows))
    batches = iter(lambda: list(itertools.islice(values, INSPECT_BATCH_SIZE)), [])
    if num_proc == 1:
        yield from itertools.chain.from_iterable(map(inspect_batch, batches))
        return
    # spawn: the readers' threads make a fork unsafe.
    with ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(inspect_batch, batch))
            if len(pending) > 2 * num_proc:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def inspect_batch(batch):
    """`inspect_image` for the images of a list of [label, caption, image 0, image 1]."""
    return [(label, caption, *map(inspect_image, images)) for label, caption, *images in batch]


def inspect_image(value):
    """Decode a whole image; returns its (width, height), a digest of its file, what is wrong: any may be `None`."""
    try:
        data = image_bytes(value)
        image = Image.open(io.BytesIO(data))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError:
        problem = "not in an image format that PIL knows"
    except Exception as error:  # PIL's decoders raise whatever damaged data makes them run into
        problem = str(error) or type(error).__name__
    else:
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1  # fits an int64
        return image.size, digest, None
    path = value.get("path") if isinstance(value, dict) else None
    return None, None, f"{path}: {problem}" if isinstance(path, str) and path not in problem else problem


def find_repeats(pairs):
    """Name the rows of `pairs`, (row, prompt, winner, loser), that say the same, and those that say the opposite."""
    pairs = pd.DataFrame(pairs, columns=["row", "prompt", "winner", "loser"])
    either_way = ["prompt", "first", "second"]
    pairs["first"], pairs["second"] = pairs[["winner", "loser"]].min(axis=1), pairs[["winner", "loser"]].max(axis=1)
    duplicates, contradictions = [], []
    for _, same_images in pairs[pairs.duplicated(either_way, keep=False)].groupby(either_way, sort=False):
        verdicts = [", ".join(map(str, rows)) for _, rows in same_images.groupby("winner", sort=False)["row"]]
        duplicates.extend(f"rows {rows}" for rows in verdicts if "," in rows)
        if len(verdicts) == 2:
            contradictions.append(f"rows {verdicts[0]} against {verdicts[1]}")
    return duplicates, contradictions


def load_tokenizer(args):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="tokenizer", revision=args.revision
    )


def find_long_captions(captions, tokenizer):
    """The most tokens that the model's tokenizer takes, and the captions, text -> (_, row), that have more."""
    max_tokens = tokenizer.model_max_length
    texts = list(captions)
    found = []
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        for text, input_ids in zip(batch, tokenizer(batch, truncation=False, verbose=False).input_ids):
            if len(input_ids) > max_tokens:
                found.append(f"row {captions[text][1]}: {len(input_ids)} tokens")
    return max_tokens, found


def print_report(counts, findings, sizes, max_tokens, args):
    """Print the table, then name the first `--max_listed` findings of every kind."""
    kinds = {
        **ERRORS,
        "empty captions": "trained on as they are",
        "long captions": f"prompts of more than {max_tokens} tokens, which are cut off",
        "small images": f"shorter side below {args.resolution} (--resolution): enlarged",
        "identical images": "both images of the pair are the same file",
        "duplicate pairs": "the same prompt, images and preference in more than one row",
        "contradicting pairs": "the same prompt and images with opposite preferences",
    }
    print(f"{'rows':<20} {counts['rows']:>11,}")
    print(f"{'pairs':<20} {counts['pairs']:>11,}  with a preference: what training reads")
    print(f"{'ties':<20} {counts['ties']:>11,}  left out of training")
    print(f"{'prompts':<20} {counts['prompts']:>11,}  different captions of the pairs")
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
        listed = findings[kind][: args.max_listed]
        if listed:
            print(f"\n{kind}:", *listed, sep="\n  ")
        if len(findings[kind]) > len(listed):
            print(f"  and {len(findings[kind]) - len(listed):,} more (--max_listed)")
    print()


# ---- filter ---------------------------------------------------------------------------------------------------------


def filter_pairs(args):
    """Keep the pairs won by an absolute winner of its prompt; write their row ids and metadata to `--output_file`."""
    if os.path.exists(args.output_file):
        raise ValueError(f"--output_file {args.output_file} exists; give a new file")
    names = {
        "--label_column": args.label_column,
        "--caption_column": args.caption_column,
        "--image_0_uid_column": args.image_0_uid_column,
        "--image_1_uid_column": args.image_1_uid_column,
    }
    if args.order_column is not None:
        names["--order_column"] = args.order_column
    tables = list(load_rows(args, names).iter(batch_size=METADATA_BATCH_SIZE))
    if not tables:
        raise ValueError("the dataset has no rows")
    table = pa.concat_tables(tables, promote_options="permissive")

    for flag, name in names.items():
        if pa.types.is_nested(table[name].type):
            raise ValueError(f"column {name} ({flag}) is of type {table[name].type}; filtering needs single values")
        if table[name].null_count:
            row = np.flatnonzero(table[name].is_null().to_numpy())[0]
            raise ValueError(f"row {row}: {name} ({flag}) is null; filtering needs it in every row")
    label = table[args.label_column].to_pandas()
    if not label.isin([0, 0.5, 1]).all():
        row = np.flatnonzero(~label.isin([0, 0.5, 1]))[0]
        raise ValueError(
            f"row {row}: {label_problem(table[args.label_column][row].as_py())} (--label_column {args.label_column})"
        )
    prompt, _ = pd.factorize(table[args.caption_column].to_pandas())
    uids = [table[name].to_pandas() for name in (args.image_0_uid_column, args.image_1_uid_column)]
    image_0, image_1 = np.split(pd.factorize(pd.concat(uids))[0], 2)
    order = None if args.order_column is None else table[args.order_column].to_pandas()

    kept = absolute_winner_rows(
        prompt, image_0, image_1, label, order, args.min_wins, args.losers, args.max_pairs_per_prompt
    )
    if len(kept) == 0:
        raise ValueError(
            f"no pair is left: no image won --min_wins {args.min_wins} pairs and neither lost nor drew one"
        )
    decided = prompt[label != 0.5]
    os.makedirs(os.path.dirname(os.path.abspath(args.output_file)), exist_ok=True)
    metadata = table.select([name for name in table.column_names if name != "row"])  # of an earlier filter
    incomplete = f"{args.output_file}.incomplete"
    pq.write_table(metadata.take(kept).add_column(0, "row", pa.array(kept)), incomplete)
    os.replace(incomplete, args.output_file)

    print(f"{len(label):,} rows, {len(label) - len(decided):,} of them ties")
    print(
        f"{len(decided):,} pairs / {len(np.unique(decided)):,} prompts -> "
        f"{len(kept):,} / {len(np.unique(prompt[kept])):,}"
    )
    print(f"row ids and metadata of the kept pairs are in {args.output_file}")
    return 0


def absolute_winner_rows(prompt, image_0, image_1, label, order, min_wins, losers, max_pairs_per_prompt):
    """
    The pairs whose winner never lost or drew under its prompt (section 5 of the paper).

    Args:
        prompt, image_0, image_1 (`np.ndarray` of `int`): per row, numbers for the caption and for the images' uids.
        label (`pd.Series`): per row 1, 0 or 0.5 (a tie: both images drew).
        order (`pd.Series` or `None`): per row, what makes a pair later than another; `None`: its position.
        min_wins (`int`): rows a winner must have won under its prompt.
        losers (`str`): "all" pairs of a winner, or the "latest" only.
        max_pairs_per_prompt (`int` or `None`): keep those whose winners won most often, then the earlier rows.

    Returns:
        `np.ndarray` of `int`: ascending row numbers.
    """
    # An image is judged under each of its prompts by itself, so that it is numbered once for each.
    num_images = max(image_0.max(), image_1.max()) + 1
    image_0, image_1 = prompt * num_images + image_0, prompt * num_images + image_1
    winner, loser = np.where(label == 1, image_0, image_1), np.where(label == 1, image_1, image_0)
    lost_or_drew = np.concatenate([loser, winner[label == 0.5]])

    pairs = pd.DataFrame(
        {"prompt": prompt, "winner": winner, "order": np.arange(len(label)) if order is None else order}
    )
    pairs = pairs[(label != 0.5) & ~pairs["winner"].isin(lost_or_drew)]
    pairs = pairs.assign(wins=pairs.groupby("winner")["winner"].transform("size"))
    pairs = pairs[pairs["wins"] >= min_wins]
    if losers == "latest":
        pairs = pairs.sort_values("order", kind="stable").drop_duplicates("winner", keep="last")
    pairs = pairs.sort_index()
    if max_pairs_per_prompt is not None:
        pairs = pairs.sort_values("wins", ascending=False, kind="stable").groupby("prompt").head(max_pairs_per_prompt)
    return np.sort(pairs.index.to_numpy())


# ---- convert --------------------------------------------------------------------------------------------------------


class Skipped(Counter):
    """What a conversion leaves out, counted by reason; every item is named in the log."""

    def add(self, item, reason, detail=None):
        logger.warning(f"skipped {item}: {detail or reason}")
        self[reason] += 1


def convert(args):
    """Write the pairs that `args.read_candidates` finds as a folder of parquet files that the trainers read."""
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; give a new folder")
    skipped = Skipped()
    features, candidates = args.read_candidates(args, skipped)
    with logging_redirect_tqdm():
        pairs = tqdm(read_images(candidates, skipped), unit=" pairs", desc="convert")
        num_pairs, num_files = write_shards(pairs, features, args.output_dir, args.max_shard_size_mb << 20)
    print(f"{num_pairs:,} pairs in {num_files:,} files in {args.output_dir}")
    for reason, count in skipped.most_common():
        print(f"skipped {count:,}: {reason}")
    return 0


def read_images(candidates, skipped):
    """Turn (item, pair with images as `image_bytes` takes them) into pairs with encoded images, or skip them."""
    for item, pair in candidates:
        if problem := label_problem(pair["label_0"]):
            skipped.add(item, "no label", problem)
            continue
        if problem := caption_problem(pair["caption"]):
            skipped.add(item, "no caption", problem)
            continue
        try:
            images = {name: {"bytes": image_bytes(pair[name]), "path": None} for name in ("jpg_0", "jpg_1")}
        except (OSError, ValueError) as error:
            skipped.add(item, "an image cannot be read", str(error))
            continue
        yield {**pair, **images, "label_0": float(pair["label_0"])}


def write_shards(pairs, features, output_dir, max_shard_bytes):
    """Write `pairs` as parquet files, all of them or none; returns the number of pairs and of files."""
    os.makedirs(output_dir, exist_ok=True)
    num_pairs, shards, groups = 0, [], row_groups(pairs)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".incomplete-") as folder:
        for first_group in groups:
            shards.append(os.path.join(folder, f"{len(shards)}.parquet"))
            with pq.ParquetWriter(shards[-1], features.arrow_schema) as writer:
                shard_bytes = 0
                for group in itertools.chain([first_group], groups):
                    table = pa.Table.from_pylist(group, schema=features.arrow_schema)
                    writer.write_table(table)
                    num_pairs += len(group)
                    shard_bytes += table.nbytes
                    if shard_bytes >= max_shard_bytes:
                        break
        if num_pairs == 0:
            raise ValueError("no pair is left; the log names what was skipped")
        for index, shard in enumerate(shards):
            os.replace(shard, os.path.join(output_dir, f"train-{index:05d}-of-{len(shards):05d}.parquet"))
    return num_pairs, len(shards)


def row_groups(pairs):
    """Collect pairs into lists of at most `ROW_GROUP_SIZE` pairs or about `ROW_GROUP_BYTES` of images."""
    group, num_bytes = [], 0
    for pair in pairs:
        group.append(pair)
        num_bytes += len(pair["jpg_0"]["bytes"]) + len(pair["jpg_1"]["bytes"])
        if len(group) == ROW_GROUP_SIZE or num_bytes >= ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def make_pair(winner, loser, caption):
    """A pair of the schema whose image 0 is the winner."""
    return {"jpg_0": winner, "jpg_1": loser, "label_0": 1.0, "caption": caption}


def read_pairs(args, skipped):
    """`convert pairs`: a chosen and a rejected image in each row."""
    rows = load_rows(
        args,
        {"--caption_column": args.caption_column},
        {"--chosen_column": args.chosen_column, "--rejected_column": args.rejected_column},
    )
    candidates = (
        (f"row {index}", make_pair(row[args.chosen_column], row[args.rejected_column], row.get(args.caption_column)))
        for index, row in enumerate(iter_rows(rows))
    )
    return SCHEMA, candidates


def read_rankings(args, skipped):
    """`convert rankings`: several images of a prompt with their ranks, together in one row or each in its own."""
    columns = {"--caption_column": args.caption_column, "--rank_column": args.rank_column}
    if args.group_column is not None:
        columns["--group_column"] = args.group_column
    image_columns = {"--image_column": args.image_column}
    rows = load_rows(args, columns, image_columns)
    if isinstance(rows, list):
        together = bool(rows) and isinstance(rows[0][args.image_column], list)
    else:
        together = isinstance(rows.features[args.image_column], (datasets.List, datasets.LargeList))
    if together:
        rankings = rankings_in_rows(rows, args, skipped)
    else:
        if not isinstance(rows, list):
            rows = load_rows(args, columns, image_columns, in_place=False)
        rankings = rankings_across_rows(rows, args, skipped)
    return SCHEMA, pair_rankings(rankings, args, skipped)


def rankings_in_rows(rows, args, skipped):
    """Yield (name, caption, [(name, rank, image), ...]) from rows with a list of images and a list of ranks."""
    for index, row in enumerate(iter_rows(rows)):
        images, ranks = row[args.image_column], row.get(args.rank_column)
        if not isinstance(images, list) or not isinstance(ranks, list) or len(images) != len(ranks):
            skipped.add(f"row {index}", "the row has no list of images with a list of as many ranks")
        elif problem := caption_problem(row.get(args.caption_column)):
            skipped.add(f"row {index}", "no caption", problem)
        else:
            names = [f"row {index}, image {position}" for position in range(len(images))]
            yield f"row {index}", row[args.caption_column], list(zip(names, ranks, images))


def rankings_across_rows(rows, args, skipped):
    """Yield (name, caption, [(name, rank, image), ...]) from rows with one image each, in any order."""
    group_column = args.group_column or args.caption_column
    groups = {}  # group -> (caption, [(row, rank), ...])
    columns = [*dict.fromkeys([group_column, args.caption_column, args.rank_column])]
    for index, row in enumerate(iter_rows(rows if isinstance(rows, list) else rows.select_columns(columns))):
        group, caption = row.get(group_column), row.get(args.caption_column)
        if problem := caption_problem(caption):
            skipped.add(f"row {index}", "no caption", problem)
        elif group is None:
            skipped.add(f"row {index}", f"{group_column} is null")
        elif groups.setdefault(group, (caption, []))[0] != caption:
            skipped.add(f"row {index}", "its caption is not that of its group's first row")
        else:
            groups[group][1].append((index, row.get(args.rank_column)))
    for group, (caption, members) in groups.items():
        ranking = []
        for index, rank in members:
            row = rows[index] if isinstance(rows, list) else rows[index].to_pylist()[0]
            ranking.append((f"row {index}", rank, row[args.image_column]))
        yield f"the ranking of {group!r}", caption, ranking


def pair_rankings(rankings, args, skipped):
    """Yield the pairs that `--pairs` makes of each ranking."""
    for ranking_name, caption, ranking in rankings:
        ranked = []
        for name, rank, image in ranking:
            if isinstance(rank, (int, float)) and not np.isnan(rank):
                ranked.append((name, rank, image))
            else:
                skipped.add(name, "no rank", f"the rank is {rank!r}; it must be a number")
        pairs = pair_ranks([rank for _, rank, _ in ranked], args.pairs, args.higher_is_better)
        if not pairs:
            skipped.add(ranking_name, "no two images of different ranks")
        for winner, loser in pairs:
            name = f"{ranked[winner][0]}, against {ranked[loser][0]}"
            yield name, make_pair(ranked[winner][2], ranked[loser][2], caption)


def pair_ranks(ranks, pairs, higher_is_better):
    """
    (winner, loser) positions in `ranks`: for "all", every two of different ranks; for "best_worst", the best against
    the worst; for "adjacent", every rank against the next. Equal ranks make no pair with each other.
    """
    levels = [
        [position for position, other in enumerate(ranks) if other == rank]
        for rank in sorted(set(ranks), reverse=higher_is_better)
    ]
    if pairs == "best_worst":
        contests = list(zip(levels[:1], levels[1:][-1:]))
    elif pairs == "adjacent":
        contests = list(zip(levels, levels[1:]))
    else:
        contests = list(itertools.combinations(levels, 2))
    return [pair for winners, losers in contests for pair in itertools.product(winners, losers)]


def read_folders(args, skipped):
    """`convert folders`: same-named images in two folders, captions in text files beside the winners."""
    winners, losers = {}, {}
    for folder, images in ((args.winners, winners), (args.losers, losers)):
        files = list_files(folder)
        images.update(images_by_name(files, lambda path: os.path.relpath(path, folder)))
        for path in files:
            if not path.lower().endswith((*IMAGE_EXTENSIONS, args.caption_extension)):
                skipped.add(path, "not an image, by its extension")

    def candidates():
        for name in sorted(winners.keys() | losers.keys()):
            if name not in losers:
                skipped.add(winners[name], "no loser of this name")
            elif name not in winners:
                skipped.add(losers[name], "no winner of this name")
            else:
                caption_file = os.path.splitext(winners[name])[0] + args.caption_extension
                try:
                    with open(caption_file, encoding="utf-8-sig") as file:
                        caption = " ".join(file.read().split())
                except (OSError, ValueError) as error:
                    skipped.add(winners[name], "its caption file cannot be read", f"{caption_file}: {error}")
                else:
                    yield winners[name], make_pair(winners[name], losers[name], caption)

    return SCHEMA, candidates()


def list_files(folder):
    """All files below a folder, in order."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder")

    def stop(error):
        raise error

    walk = os.walk(folder, onerror=stop, followlinks=True)
    return sorted(os.path.join(root, name) for root, _, names in walk for name in names)


def images_by_name(files, name_of):
    """Map `name_of(path)`, less its extension, to the path of each image among `files`."""
    images = {}
    for path in files:
        if path.lower().endswith(IMAGE_EXTENSIONS):
            other = images.setdefault(os.path.splitext(name_of(path))[0], path)
            if other != path:
                raise ValueError(f"{other} and {path} have the same name; keep one of them")
    return images


def read_pick_a_pic(args, skipped):
    """`convert pick_a_pic`: metadata with the uids of images that are kept elsewhere; ties stay, `filter` needs them."""
    uid_columns = (args.image_0_uid_column, args.image_1_uid_column)
    rows = load_rows(
        args,
        {
            "--label_column": args.label_column,
            "--caption_column": args.caption_column,
            "--image_0_uid_column": args.image_0_uid_column,
            "--image_1_uid_column": args.image_1_uid_column,
        },
    )
    find_image = image_finder(args)
    metadata = metadata_features(rows.features, args)

    def candidates():
        for index, row in enumerate(iter_rows(rows)):
            images = [find_image(str(row[column])) for column in uid_columns]
            missing = [str(row[column]) for column, image in zip(uid_columns, images) if image is None]
            if missing:
                skipped.add(f"row {index}", "no image of this uid", f"no image of uid {' and '.join(missing)}")
                continue
            pair = {"jpg_0": images[0], "jpg_1": images[1], **{name: row[name] for name in metadata}}
            yield f"row {index}", {**pair, "label_0": row[args.label_column], "caption": row[args.caption_column]}

    return Features({**SCHEMA, **metadata}), candidates()


def image_finder(args):
    """A function from an uid to its image in `--images_dir` or `--images_dataset`, or to `None`."""
    if (args.images_dir is None) == (args.images_dataset is None):
        raise ValueError("give either --images_dir or --images_dataset, and not both")
    if args.images_dir is not None:
        return images_by_name(list_files(args.images_dir), os.path.basename).get
    images = open_dataset(args.images_dataset, None, args.images_split_name, args.cache_dir, in_place=False)
    columns = {"--uid_column": args.uid_column, "--image_column": args.image_column}
    check_columns(columns, images.column_names, f"--images_dataset {args.images_dataset}")
    uids = itertools.chain.from_iterable(
        table[args.uid_column].to_pylist()
        for table in images.select_columns([args.uid_column]).iter(batch_size=METADATA_BATCH_SIZE)
    )
    positions = {str(uid): position for position, uid in enumerate(uids)}

    def find_image(uid):
        if uid in positions:
            return images[positions[uid]][args.image_column][0].as_py()

    return find_image


def metadata_features(features, args):
    """The features that a conversion takes over beside the schema's."""
    ours = {*SCHEMA, args.label_column, args.caption_column}
    return {name: feature for name, feature in features.items() if name not in ours and not holds_images(feature)}


def read_kept_rows(args, skipped):
    """`convert rows`: the rows that `filter` kept, with their images."""
    kept = pq.read_table(args.rows_file)
    columns = {"--label_column": args.label_column, "--caption_column": args.caption_column}
    check_columns({"--rows_file": "row", **columns}, kept.column_names, args.rows_file)
    kept = kept.sort_by("row")
    image_columns = {"--image_0_column": args.image_0_column, "--image_1_column": args.image_1_column}
    rows = take_rows(load_rows(args, columns, image_columns), kept["row"].to_numpy())
    metadata = metadata_features(Features.from_arrow_schema(kept.schema), args)

    def candidates():
        for batch in kept.to_batches(max_chunksize=1000):
            for entry in batch.to_pylist():
                row = next(rows, None)
                if row is None:
                    raise ValueError(
                        f"{args.rows_file} has row {entry['row']}, which is beyond the end of the dataset"
                    )
                for column in columns.values():
                    if row.get(column) != entry[column]:
                        raise ValueError(
                            f"row {entry['row']} has {column} {row.get(column)!r} in the dataset, {entry[column]!r} in "
                            f"{args.rows_file}; the dataset and split must be those that `filter` read"
                        )
                pair = {"jpg_0": row[args.image_0_column], "jpg_1": row[args.image_1_column]}
                pair.update(label_0=row[args.label_column], caption=row[args.caption_column])
                yield f"row {entry['row']}", {**pair, **{name: entry[name] for name in metadata}}

    return Features({**SCHEMA, **metadata}), candidates()


def take_rows(rows, indices):
    """Yield the rows of these ascending indices, reading in order."""
    if isinstance(rows, list):
        yield from (rows[index] for index in indices if index < len(rows))
        return
    start = 0
    for table in rows.iter(batch_size=READ_BATCH_SIZE):
        first, last = np.searchsorted(indices, [start, start + table.num_rows])
        yield from table.take(indices[first:last] - start).to_pylist()
        start += table.num_rows


# ---- Command line ---------------------------------------------------------------------------------------------------


def positive_int(text):
    """An argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse_args(input_args=None):
    source = argparse.ArgumentParser(add_help=False)
    group = source.add_argument_group("source", "Give either --dataset_name or --train_data_dir.")
    group.add_argument("--dataset_name", help="Hub id, local folder of parquet files, or local parquet file.")
    group.add_argument("--dataset_config_name", help="Configuration of the dataset, where it has several.")
    group.add_argument("--dataset_split_name", default="train", help="Split of the dataset (default: %(default)s).")
    group.add_argument(
        "--train_data_dir",
        help="Folder of images with a metadata.jsonl that names the image of a column `x` as `x_file_name`.",
    )
    group.add_argument("--cache_dir", help="Where `datasets` keeps what it downloads or copies.")

    def column_flags(**columns):
        parent = argparse.ArgumentParser(add_help=False)
        for name, (default, meaning) in columns.items():
            parent.add_argument(f"--{name}", default=default, help=f"Column of {meaning} (default: %(default)s).")
        return parent

    images = column_flags(image_0_column=("jpg_0", "image 0"), image_1_column=("jpg_1", "image 1"))
    uids = column_flags(
        image_0_uid_column=("image_0_uid", "what identifies image 0"),
        image_1_uid_column=("image_1_uid", "what identifies image 1"),
    )
    labels = column_flags(
        label_column=("label_0", "the label, 1: image 0 wins, 0: image 1 wins, 0.5: a tie"),
        caption_column=("caption", "the caption"),
    )
    prompts = column_flags(caption_column=("prompt", "the caption"))

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--output_dir", required=True, help="New folder for the parquet files.")
    output.add_argument(
        "--max_shard_size_mb",
        type=positive_int,
        default=500,
        help="Size of a parquet file (default: %(default)s MiB).",
    )

    parser = argparse.ArgumentParser(
        description="Check, filter and convert preference pairs.", epilog="The top of this file shows how to run each."
    )
    commands = parser.add_subparsers(metavar="check | filter | convert", required=True)

    command = commands.add_parser("check", parents=[source, images, labels], help="Report what training would meet.")
    command.add_argument("--streaming", action="store_true", help="Read a hub dataset without keeping a copy of it.")
    command.add_argument(
        "--pretrained_model_name_or_path", help="Model whose tokenizer says which captions are too long."
    )
    command.add_argument("--revision", help="Revision of the model.")
    command.add_argument(
        "--resolution", type=positive_int, default=512, help="Name images smaller than this (default: %(default)s)."
    )
    command.add_argument(
        "--num_proc",
        type=positive_int,
        default=min(os.cpu_count(), 16),
        help="Processes that decode images (default: one per core, at most 16).",
    )
    command.add_argument(
        "--max_listed",
        type=positive_int,
        default=20,
        help="How many findings of a kind to name (default: %(default)s).",
    )
    command.set_defaults(command=check)

    command = commands.add_parser(
        "filter", parents=[source, uids, labels], help="Keep the pairs won by an absolute winner of its prompt."
    )
    command.add_argument("--output_file", required=True, help="Parquet file for the kept rows, for `convert rows`.")
    command.add_argument(
        "--min_wins",
        type=positive_int,
        default=1,
        help="Pairs that a winner must have won under its prompt; 1 (default): the authors' code, 2: the paper.",
    )
    command.add_argument(
        "--losers",
        choices=["all", "latest"],
        default="all",
        help="Pair a winner with all its losers (default) or with the latest one, by row.",
    )
    command.add_argument("--order_column", help="What `latest` goes by instead of the row, such as created_at.")
    command.add_argument(
        "--max_pairs_per_prompt",
        type=positive_int,
        help="Balance the prompts: of each, keep this many pairs, those whose winner won most often, then by row.",
    )
    command.set_defaults(command=filter_pairs)

    sources = commands.add_parser("convert", help="Make a dataset that the trainers read.").add_subparsers(
        metavar="pairs | rankings | folders | pick_a_pic | rows", required=True
    )

    command = sources.add_parser(
        "pairs", parents=[source, prompts, output], help="From columns of chosen and rejected images."
    )
    command.add_argument("--chosen_column", default="chosen", help="Column of the winner (default: %(default)s).")
    command.add_argument("--rejected_column", default="rejected", help="Column of the loser (default: %(default)s).")
    command.set_defaults(command=convert, read_candidates=read_pairs)

    command = sources.add_parser(
        "rankings",
        parents=[source, prompts, output],
        help="From several ranked images per prompt: one row per image, or a row with lists of images and ranks.",
    )
    command.add_argument(
        "--image_column", default="image", help="Column of the image or images (default: %(default)s)."
    )
    command.add_argument("--rank_column", default="rank", help="Column of the rank or ranks (default: %(default)s).")
    command.add_argument(
        "--higher_is_better", action="store_true", help="The ranks are scores; otherwise 1 is the best."
    )
    command.add_argument(
        "--group_column",
        help="Column that tells rankings apart, where one prompt was ranked more than once (default: the caption's).",
    )
    command.add_argument(
        "--pairs",
        choices=["all", "best_worst", "adjacent"],
        default="all",
        help="Every two of different ranks (default), the best against the worst, or each rank against the next.",
    )
    command.set_defaults(command=convert, read_candidates=read_rankings)

    command = sources.add_parser(
        "folders", parents=[output], help="From two folders of same-named images with captions in text files."
    )
    command.add_argument("--winners", required=True, help="Folder of the winners, with the captions.")
    command.add_argument("--losers", required=True, help="Folder of the losers.")
    command.add_argument(
        "--caption_extension", default=".txt", help="Extension of the caption files (default: %(default)s)."
    )
    command.set_defaults(command=convert, read_candidates=read_folders)

    command = sources.add_parser(
        "pick_a_pic",
        parents=[source, uids, labels, output],
        help="From Pick-a-Pic metadata, or what `filter` kept of it, and images kept elsewhere.",
    )
    command.add_argument("--images_dir", help="Folder of images named by their uids, sub-folders included.")
    command.add_argument("--images_dataset", help="Hub id, local folder or parquet file with uids and images.")
    command.add_argument("--images_split_name", default="train", help="Its split (default: %(default)s).")
    command.add_argument("--uid_column", default="uid", help="Its column of uids (default: %(default)s).")
    command.add_argument("--image_column", default="image", help="Its column of images (default: %(default)s).")
    command.set_defaults(command=convert, read_candidates=read_pick_a_pic)

    command = sources.add_parser(
        "rows", parents=[source, images, labels, output], help="From the rows that `filter` kept and their dataset."
    )
    command.add_argument("--rows_file", required=True, help="What `filter` wrote.")
    command.set_defaults(command=convert, read_candidates=read_kept_rows)

    return parser.parse_args(input_args)


def main(args):
    """Run a command; input that it cannot work with is an error of one line and exit code 2."""
    try:
        return args.command(args)
    except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(main(parse_args()))
