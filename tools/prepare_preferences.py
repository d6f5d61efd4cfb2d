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

Read a dataset once, as training does, and say what it would trip over; exit code 1 if it would stop, 2 if nothing can
be read:

    python tools/prepare_preferences.py check --dataset_name my_pairs --pretrained_model_name_or_path MODEL
    python tools/prepare_preferences.py check --train_data_dir my_images --resolution 1024

Keep the pairs won by an absolute winner of its prompt, from the metadata alone, then make a dataset of those rows:

    python tools/prepare_preferences.py filter --dataset_name pick_a_pic --min_wins 2 --output_file kept.parquet
    python tools/prepare_preferences.py convert rows --rows_file kept.parquet --dataset_name pick_a_pic --output_dir filtered

Turn other shapes into the trainers':

    # columns `prompt`, `chosen` and `rejected`
    python tools/prepare_preferences.py convert pairs --dataset_name trl_pairs --output_dir my_pairs
    # ranked images of each prompt, one in a row, or a list of images and a list of ranks in a row
    python tools/prepare_preferences.py convert rankings --dataset_name ranked --pairs best_worst --output_dir my_pairs
    # two folders of same-named images, captions in .txt files beside the winners
    python tools/prepare_preferences.py convert folders --winners better --losers worse --output_dir my_pairs
    # Pick-a-Pic metadata, or what `filter` kept of it, and images that are kept elsewhere under their uids
    python tools/prepare_preferences.py convert pick_a_pic --dataset_name kept.parquet --images_dir images --output_dir my_pairs

`filter` and `convert` read parquet files in order where they are, so that their size does not matter. Where rows are
needed in another order (rankings with one image in a row, `--images_dataset`), and for `check`, as for training,
`datasets` keeps a copy under `--cache_dir`. `convert` copies the encoded images as they are, without decoding them,
and names whatever it skips: run `check` on what it wrote.
"""

import argparse
import copy
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from PIL import UnidentifiedImageError
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


# For `train_ncp_dpo_sd15`, which reads pairs. It is imported where it is needed, since torch takes seconds to load.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

logger = logging.getLogger("prepare_preferences")

SCHEMA = Features({"jpg_0": Image(), "jpg_1": Image(), "label_0": Value("float64"), "caption": Value("string")})
IMAGE_EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
READ_BATCH_SIZE = 32  # rows held with their images: it bounds the memory
METADATA_BATCH_SIZE = 100_000
LISTS = (datasets.List, datasets.LargeList)
ROW_GROUP_SIZE, ROW_GROUP_BYTES = 100, 64 << 20  # readers of a parquet file hold a row group in memory


# Reading other columns and shapes than training's


def load_rows(args, columns, image_columns=None, in_place=True):
    """
    Open `--dataset_name` or `--train_data_dir`, see `open_dataset`. Images stay encoded, or the names of their files.

    `columns` and `image_columns`, flag -> name, must be there. With image columns, the rows have just these and
    `columns`; without, every column that holds no image, and no image data is read from the disk.
    """
    check_source(args)
    image_columns = image_columns or {}
    if args.train_data_dir is not None:
        where = os.path.join(args.train_data_dir, "metadata.jsonl")
        dataset = read_metadata(where)
        file_names = {flag: f"{name}_file_name" for flag, name in image_columns.items()}
    else:
        where, file_names = f"--dataset_name {args.dataset_name}", image_columns
        dataset = open_dataset(
            args.dataset_name, args.dataset_config_name, args.dataset_split_name, args.cache_dir, in_place
        )
    check_columns(columns | file_names, dataset.features, where)
    kind = str(dataset.features.arrow_schema.field(args.caption_column).type)
    if not re.match("null|(large_)?string", kind):
        raise ValueError(f"{where}: column {args.caption_column} (--caption_column) is of type {kind}, not text")
    if not image_columns:
        return dataset.select_columns([name for name, kind in dataset.features.items() if not holds_images(kind)])
    dataset = dataset.select_columns(list(dict.fromkeys([*file_names.values(), *columns.values()])))
    if args.train_data_dir is not None:
        dataset = dataset.rename_columns(dict(zip(file_names.values(), image_columns.values())))
    return dataset


def check_source(args):
    """Raise a ValueError unless one of the two sources is given."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("give either --dataset_name or --train_data_dir, and not both")


def flags_of(args, *names):
    """Flag -> column, of those of these flags that are given."""
    return {f"--{name}": getattr(args, name) for name in names if getattr(args, name) is not None}


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
    if isinstance(feature, LISTS):
        return holds_images(feature.feature)
    return isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary"))


def open_dataset(name, config_name, split, cache_dir, in_place):
    """
    Open a hub id, a local folder or a local parquet file: as `ParquetFiles`, or, where that cannot be or must not, in
    the cache as a `datasets.Dataset` in arrow format, whose rows can be read in any order.
    """
    if os.path.isfile(name):
        source = {"path": "parquet", "data_files": {split: name}, "cache_dir": cache_dir}
    else:
        source = {"path": name, "name": config_name, "cache_dir": cache_dir}
    try:
        data_files = datasets.load_dataset_builder(**source).config.data_files or {}
        if data_files and split.isidentifier() and split not in data_files:
            # Or else all splits would be copied before anything is said.
            raise ValueError(f"its splits (--dataset_split_name) are {', '.join(map(str, data_files))}")
        files = data_files.get(split, [])
        if in_place and files and all(file.endswith(".parquet") for file in files):
            return ParquetFiles(files)
        return datasets.load_dataset(**source, split=split).with_format("arrow")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"cannot load {name}, split {split}: {error}") from error


class ParquetFiles:
    """
    The rows of parquet files, read in order from where they are, on the disk or on the hub: the part of
    `datasets.Dataset` that the commands need. The columns are those of the first file.

    `datasets`' own streaming reads ahead without a bound, and its scanner's threads can abort Python when it exits
    (https://github.com/huggingface/datasets/issues/7566), which would falsify the exit code.
    """

    def __init__(self, files):
        self.files = files
        with fsspec.open(files[0], "rb") as file:
            self.features = Features.from_arrow_schema(pq.read_schema(file))

    def select_columns(self, column_names):
        selected = copy.copy(self)
        selected.features = Features({name: self.features[name] for name in column_names})
        return selected

    def iter(self, batch_size):
        for path in self.files:
            try:
                with fsspec.open(path, "rb") as file:
                    # Buffered: a row group of images may be larger than the memory.
                    parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
                    if missing := self.features.keys() - set(parquet.schema_arrow.names):
                        raise ValueError(f"it has no {', '.join(sorted(missing))}, which {self.files[0]} has")
                    for batch in parquet.iter_batches(batch_size, columns=list(self.features)):
                        yield pa.Table.from_batches([batch])
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ValueError(f"{path}: {error}") from error


def read_metadata(path):
    """All columns of a metadata.jsonl as a `datasets.Dataset` in arrow format."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; --train_data_dir needs it, with one JSON object per line")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Without an encoding named, a byte-order mark is accepted.
                rows.append(dict(json.loads(line)))
                # Fails for half of a surrogate pair, which no file can hold.
                json.dumps(rows[-1], ensure_ascii=False).encode()
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (OverflowError, pa.ArrowException) as error:
            raise ValueError(f"{path} mixes types in column {name}: {error}") from error
    return Dataset.from_dict(columns).with_format("arrow")


def iter_rows(rows):
    """Yield what `load_rows` returned row by row, as dicts."""
    for table in rows.iter(batch_size=READ_BATCH_SIZE):
        yield from table.to_pylist()


def encoded_bytes(value, args=None):
    """
    The encoded bytes of an image that is given as bytes, as a path or as `datasets`' `{"bytes", "path"}`; a ValueError
    or OSError says why there are none. With `args`, a path that is text comes from the data and may lead to no other
    place than in training; a `Path` was found in a folder and may.
    """
    if not isinstance(value, Path):
        if isinstance(value, (bytes, str)):
            value = {"bytes" if isinstance(value, bytes) else "path": value}
        if not isinstance(value, (dict, type(None))):
            raise ValueError(f"{value!r:.80} instead of an image")
        value = {"bytes": None, "path": None, **(value or {})}
        if args is not None:
            from train_ncp_dpo_sd15 import locate_image

            value = locate_image(args, value)
        else:
            value = value["path"] if value["bytes"] is None else value["bytes"]
    data = value if isinstance(value, bytes) else Path(value).read_bytes()
    if not data:
        raise ValueError("empty, 0 bytes")
    return data


# check


ERRORS = {
    "unreadable images": "training stops at one",
    "bad labels": "not 1, 0 or 0.5; training stops at one",
    "bad captions": "null; training stops at one",
    "bad probabilities": "not from 0 to 1; training stops at one",
}
# From which share of pairs on winners or losers of one source are warned of.
ONE_SIDED = 0.9


def check(args):
    """Read every row once, print a report, and return 1 if training would stop on the dataset, else 0."""
    check_source(args)
    from train_ncp_dpo_sd15 import find_problem, load_dataset

    tokenizer, max_tokens = load_tokenizer(args)
    image_columns = (args.image_0_column, args.image_1_column)
    dataset = load_dataset(args)

    num_pairs, num_ties = 0, 0
    findings = defaultdict(list)  # kind -> what was found, each naming its row
    sizes, captions, pairs = Counter(), {}, []
    inspected = tqdm(inspect_rows(args, dataset), total=len(dataset), unit=" rows", desc="check")
    probabilities, column = itertools.repeat(1), args.preference_probability_column
    if column is not None:
        probabilities = dataset[column]
    for row, ((label, caption, images), probability) in enumerate(zip(inspected, probabilities)):
        problems = [("bad labels", find_problem(label=label)), ("bad captions", find_problem(caption=caption))]
        problems.append(("bad probabilities", find_problem(probability=probability)))
        for column, (size, _, problem) in zip(image_columns, images):
            problems.append(("unreadable images", problem and f"{column}: {problem}"))
            if size is not None:
                sizes[size] += 1
                if min(size) < args.resolution:
                    findings["small images"].append(f"row {row}, {column}: {size[0]}x{size[1]}")
        for kind, problem in problems:
            if problem is not None:
                findings[kind].append(f"row {row}, {problem}")

        num_ties += label == 0.5
        if label not in (0, 1):
            continue
        num_pairs += 1
        if caption is not None:
            prompt, _ = captions.setdefault(caption, (len(captions), row))
            if not caption.strip():
                findings["empty captions"].append(f"row {row}")
        if all(problem is None for _, problem in problems):
            winner, loser = (digest for _, digest, _ in (images if label == 1 else reversed(images)))
            if winner == loser:
                findings["identical images"].append(f"row {row}")
            else:
                pairs.append((row, prompt, winner, loser))

    findings["duplicate pairs"], findings["contradicting pairs"] = find_repeats(pairs)
    for text, (_, first_row) in captions.items() if tokenizer else ():
        if (length := len(tokenizer(text, verbose=False).input_ids)) > max_tokens:
            findings["long captions"].append(f"row {first_row}: {length} tokens")
    counts = {
        "rows": (len(dataset), ""),
        "pairs": (num_pairs, "  with a preference: what training reads"),
        "ties": (num_ties, "  left out of training"),
        "prompts": (len(captions), "  different captions of the pairs"),
    }
    print_report(args, counts, findings, sizes, max_tokens)
    if warning := source_warning(read_sources(args)):
        print(f"Warning: {warning}\n")

    errors = [f"{len(findings[kind]):,} {kind}" for kind in ERRORS if findings[kind]]
    if num_pairs == 0:
        errors.append("no pair is left")
    print(f"Not fit for training: {', '.join(errors)}." if errors else "Fit for training.")
    return 1 if errors else 0


def inspect_rows(args, dataset):
    """
    Yield each row's label, caption and what `inspect_image` says of its two images: nothing for a tie, whose images
    training does not open. Images are decoded by `--num_proc` threads, to which a bounded number of rows is on its way.
    """
    with ThreadPoolExecutor(args.num_proc) as pool:
        pending = deque()
        for row in dataset:
            label, caption = row[args.label_column], row[args.caption_column]
            images = [] if label == 0.5 else [row[args.image_0_column], row[args.image_1_column]]
            pending.append((label, caption, [pool.submit(inspect_image, image, args) for image in images]))
            if len(pending) > 2 * args.num_proc:
                label, caption, images = pending.popleft()
                yield label, caption, [image.result() for image in images]
        for label, caption, images in pending:
            yield label, caption, [image.result() for image in images]


def inspect_image(value, args=None):
    """
    Decode an image, given as `encoded_bytes` takes it, by training's own reader; returns its upright (width, height),
    a digest of its file and what is wrong with it: any may be `None`.
    """
    from train_ncp_dpo_sd15 import one_line, read_image

    try:
        data = encoded_bytes(value, args)
        size = read_image(data).size
    except UnidentifiedImageError:
        problem = "not in an image format that PIL knows"
    except Exception as error:  # PIL's decoders raise whatever damaged data makes them run into
        problem = one_line(error) or type(error).__name__
    else:
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1  # fits an int64
        return size, digest, None
    path = value.get("path") if isinstance(value, dict) else None
    named = path is None or value["bytes"] is not None or path[:20] in problem
    return None, None, problem if named else f"{one_line(path, 100)}: {problem}"


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


def name_source(model, lora=None):
    """Where an image comes from, in words."""
    return f"{model or 'no model'}{f' with {lora}' if lora else ''}"


def read_sources(args):
    """The sources of each pair's winner and loser, where the data have them: columns model_0, model_1 and lora_weights_0, _1."""
    names = ["model_0", "model_1", "lora_weights_0", "lora_weights_1"]
    if args.train_data_dir is not None:
        # Line by line, as in training: columns that are nobody's business may mix types.
        text = Path(args.train_data_dir, "metadata.jsonl").read_text(encoding="utf-8-sig")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        table = load_rows(args, flags_of(args, "label_column"))
        rows = iter_rows(
            table.select_columns([args.label_column, *(name for name in names if name in table.features)])
        )
    sources = []
    for row in rows:
        if row[args.label_column] in (0, 1) and "model_0" in row and "model_1" in row:
            pair = [name_source(row[f"model_{side}"], row.get(f"lora_weights_{side}")) for side in (0, 1)]
            sources.append(pair if row[args.label_column] == 1 else pair[::-1])
    return sources


def source_warning(pairs):
    """What to say if images of one source win, or lose, nearly all `pairs`, (winner's source, loser's), against others'."""
    for side, role in enumerate(("winner", "loser")):
        counts = Counter(pair[side] for pair in pairs if pair[0] != pair[1])
        for source, count in counts.most_common(1):
            if count >= ONE_SIDED * len(pairs):
                return (
                    f"in {count:,} of {len(pairs):,} pairs the {role} is from {source} and the other image is not. Trained on "
                    "this, a model learns to tell the sources apart, such as real from generated images, and its images "
                    "are known to collapse. Take both images of a pair from the same source."
                )
    return None


def load_tokenizer(args):
    """The model's tokenizer and how many tokens of a caption the model takes; without a model, twice `None`."""
    if args.pretrained_model_name_or_path is None:
        return None, None
    from transformers import CLIPTextConfig, CLIPTokenizer

    model = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    tokenizer = CLIPTokenizer.from_pretrained(**model, subfolder="tokenizer")
    # Some tokenizers have no limit of their own.
    limit = CLIPTextConfig.from_pretrained(**model, subfolder="text_encoder").max_position_embeddings
    return tokenizer, min(limit, tokenizer.model_max_length)


def print_report(args, counts, findings, sizes, max_tokens):
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
    """Keep the pairs won by an absolute winner of its prompt; write their row ids and metadata to `--output_file`."""
    if os.path.exists(args.output_file):
        raise ValueError(f"--output_file {args.output_file} exists; give a new file")
    uid_flags = ("image_0_uid_column", "image_1_uid_column")
    names = flags_of(args, "label_column", "caption_column", *uid_flags, "order_column")
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
    if len(wrong := np.flatnonzero(~label.isin([0, 0.5, 1]))):
        raise ValueError(f"row {wrong[0]}: {args.label_column} (--label_column) is not 1, 0 or 0.5: {label[wrong[0]]}")
    prompt, _ = pd.factorize(table[args.caption_column].to_pandas())
    uids = [table[getattr(args, name)].to_pandas() for name in uid_flags]
    image_0, image_1 = np.split(pd.factorize(pd.concat(uids))[0], 2)
    order = None if args.order_column is None else table[args.order_column].to_pandas()

    options = args.min_wins, args.losers, args.max_pairs_per_prompt
    kept = absolute_winner_rows(prompt, image_0, image_1, label, order, *options)
    if len(kept) == 0:
        raise ValueError(f"no pair is left: no winner of --min_wins {args.min_wins} pairs neither lost nor drew one")
    decided = prompt[label != 0.5]
    os.makedirs(os.path.dirname(os.path.abspath(args.output_file)), exist_ok=True)
    metadata = table.select([name for name in table.column_names if name != "row"])  # of an earlier filter
    incomplete = f"{args.output_file}.incomplete"
    pq.write_table(metadata.take(kept).add_column(0, "row", pa.array(kept)), incomplete)
    os.replace(incomplete, args.output_file)

    print(f"{len(label):,} rows, {len(label) - len(decided):,} of them ties")
    left = f"{len(kept):,} / {len(np.unique(prompt[kept])):,}"
    print(f"{len(decided):,} pairs / {len(np.unique(decided)):,} prompts -> {left}")
    print(f"row ids and metadata of the kept pairs are in {args.output_file}")
    return 0


def absolute_winner_rows(prompt, image_0, image_1, label, order, min_wins, losers, max_pairs_per_prompt):
    """
    Ascending numbers of the rows whose winner never lost or drew under its prompt (section 5 of the paper).

    Per row, `prompt`, `image_0` and `image_1` are numbers for the caption and for the images' uids, `label` is a
    `pd.Series` of 1, 0 or 0.5 (a tie: both images drew) and `order` what makes a pair later than another, or `None`:
    its position. `max_pairs_per_prompt` keeps those whose winners won most often, then the earlier rows.
    """
    # An image is judged under each of its prompts by itself, so that it is numbered once for each.
    num_images = max(image_0.max(), image_1.max()) + 1
    image_0, image_1 = prompt * num_images + image_0, prompt * num_images + image_1
    winner, loser = np.where(label == 1, image_0, image_1), np.where(label == 1, image_1, image_0)
    lost_or_drew = np.concatenate([loser, winner[label == 0.5]])

    order = np.arange(len(label)) if order is None else order
    pairs = pd.DataFrame({"prompt": prompt, "winner": winner, "order": order})
    pairs = pairs[(label != 0.5) & ~pairs["winner"].isin(lost_or_drew)]
    pairs = pairs.assign(wins=pairs.groupby("winner")["winner"].transform("size"))
    pairs = pairs[pairs["wins"] >= min_wins]
    if losers == "latest":
        pairs = pairs.sort_values("order", kind="stable").drop_duplicates("winner", keep="last")
    pairs = pairs.sort_index()
    if max_pairs_per_prompt is not None:
        pairs = pairs.sort_values("wins", ascending=False, kind="stable").groupby("prompt").head(max_pairs_per_prompt)
    return np.sort(pairs.index.to_numpy())


# convert


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
        pairs = tqdm(read_images(args, candidates, skipped), unit=" pairs", desc="convert")
        num_pairs, num_files = write_shards(pairs, features, args.output_dir, args.max_shard_size_mb << 20)
    print(f"{num_pairs:,} pairs in {num_files:,} files in {args.output_dir}")
    for reason, count in skipped.most_common():
        print(f"skipped {count:,}: {reason}")
    return 0


def read_images(args, candidates, skipped):
    """Turn (item, pair with images as `encoded_bytes` takes them) into pairs with encoded images, or skip them."""
    from train_ncp_dpo_sd15 import find_problem

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


def find_image_source(args):
    """The flags that say in which folder the images of a conversion must lie, where its data name files."""
    source = argparse.Namespace(**{"train_data_dir": None, "dataset_name": None, "cache_dir": None, **vars(args)})
    if getattr(args, "images_dataset", None) is not None:
        source.train_data_dir, source.dataset_name = None, args.images_dataset
    if source.dataset_name is not None and os.path.isfile(source.dataset_name):
        source.dataset_name = os.path.dirname(os.path.abspath(source.dataset_name))
    return source


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
    rows = load_rows(args, flags_of(args, "caption_column"), flags_of(args, "chosen_column", "rejected_column"))
    candidates = (
        (f"row {index}", make_pair(row[args.chosen_column], row[args.rejected_column], row[args.caption_column]))
        for index, row in enumerate(iter_rows(rows))
    )
    return SCHEMA, candidates


def read_rankings(args, skipped):
    """`convert rankings`: several images of a prompt with their ranks, together in one row or each in its own."""
    columns, images = flags_of(args, "caption_column", "rank_column", "group_column"), flags_of(args, "image_column")
    rows = load_rows(args, columns, images)
    if isinstance(rows.features[args.image_column], LISTS):
        rankings = rankings_in_rows(rows, args, skipped)
    else:
        rankings = rankings_across_rows(load_rows(args, columns, images, in_place=False), args, skipped)
    return SCHEMA, pair_rankings(rankings, args, skipped)


def rankings_in_rows(rows, args, skipped):
    """Yield (name, caption, [(name, rank, image), ...]) from rows with a list of images and a list of ranks."""
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
    """Yield (name, caption, [(name, rank, image), ...]) from rows with one image each, in any order."""
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
    """Yield the pairs that `--pairs` makes of each ranking."""
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


def pair_ranks(ranks, pairs, higher_is_better):
    """
    (winner, loser) positions in `ranks`: for "all", every two of different ranks; for "best_worst", the best against
    the worst; for "adjacent", every rank against the next. Equal ranks make no pair with each other.
    """
    different = sorted(set(ranks), reverse=higher_is_better)
    levels = [[position for position, other in enumerate(ranks) if other == rank] for rank in different]
    contests = {
        "all": itertools.combinations(levels, 2),
        "best_worst": zip(levels[:1], levels[1:][-1:]),
        "adjacent": zip(levels, levels[1:]),
    }[pairs]
    return [pair for winners, losers in contests for pair in itertools.product(winners, losers)]


def read_folders(args, skipped):
    """`convert folders`: same-named images in two folders, captions in text files beside the winners."""
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
                    caption = " ".join(caption_file.read_text(encoding="utf-8-sig").split())
                except (OSError, ValueError) as error:
                    skipped.add(winners[name], "its caption file cannot be read", f"{caption_file}: {error}")
                else:
                    yield winners[name], make_pair(winners[name], losers[name], caption)

    return SCHEMA, candidates()


def find_images(folder, name_of, skipped=None, caption_extension=""):
    """Map `name_of(path)` to the path of each image below a folder; `skipped` names what is neither it nor caption."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder")

    def stop(error):
        raise error

    images = {}
    walk = os.walk(folder, onerror=stop, followlinks=True)
    for path in sorted(Path(root, name) for root, _, names in walk for name in names):
        if path.name.lower().endswith(IMAGE_EXTENSIONS):
            if (other := images.setdefault(name_of(path), path)) != path:
                raise ValueError(f"{other} and {path} have the same name; keep one of them")
        elif skipped is not None and not path.name.endswith(caption_extension):
            skipped.add(path, "not an image, by its extension")
    return images


def read_pick_a_pic(args, skipped):
    """`convert pick_a_pic`: metadata with the uids of images that are kept elsewhere; ties stay, `filter` needs them."""
    uid_columns = flags_of(args, "image_0_uid_column", "image_1_uid_column")
    rows = load_rows(args, {**flags_of(args, "label_column", "caption_column"), **uid_columns})
    find_image = image_finder(args)
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


def image_finder(args):
    """A function from an uid to its image in `--images_dir` or `--images_dataset`, or to `None`."""
    if (args.images_dir is None) == (args.images_dataset is None):
        raise ValueError("give either --images_dir or --images_dataset, and not both")
    if args.images_dir is not None:
        return find_images(args.images_dir, lambda path: path.stem).get
    images = open_dataset(args.images_dataset, None, args.images_split_name, args.cache_dir, in_place=False)
    columns = flags_of(args, "uid_column", "image_column")
    check_columns(columns, images.features, f"--images_dataset {args.images_dataset}")
    positions = {str(uid): position for position, uid in enumerate(images.data[args.uid_column].to_pylist())}
    return lambda uid: images[positions[uid]][args.image_column][0].as_py() if uid in positions else None


def metadata_features(features, args):
    """The features that a conversion takes over beside the schema's."""
    ours = {*SCHEMA, args.label_column, args.caption_column}
    return {name: feature for name, feature in features.items() if name not in ours and not holds_images(feature)}


def read_kept_rows(args, skipped):
    """`convert rows`: the rows that `filter` kept, with their images."""
    kept = pq.read_table(args.rows_file)
    columns = flags_of(args, "label_column", "caption_column")
    check_columns({"--rows_file": "row", **columns}, kept.column_names, args.rows_file)
    kept = kept.sort_by("row")
    rows = load_rows(args, columns, flags_of(args, "image_0_column", "image_1_column"))
    rows = take_rows(rows, kept["row"].to_numpy())
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


def take_rows(rows, indices):
    """Yield the rows of these ascending indices, reading in order."""
    start = 0
    for table in rows.iter(batch_size=READ_BATCH_SIZE):
        first, last = np.searchsorted(indices, [start, start + table.num_rows])
        yield from table.take(indices[first:last] - start).to_pylist()
        start += table.num_rows


# Command line


def positive_int(text):
    """An argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def shared_flags(*flags, **columns):
    """A parent parser of flags (name, default, help) and of flags of columns: name=(default, what it holds)."""
    parent = argparse.ArgumentParser(add_help=False)
    flags += tuple((name, default, f"Column of {meaning}.") for name, (default, meaning) in columns.items())
    for name, default, text in flags:
        parent.add_argument(f"--{name}", default=default, help=text + (" Default: %(default)s." if default else ""))
    return parent


def parse_args(input_args=None):
    source = shared_flags(
        ("dataset_name", None, "Hub id, local folder of parquet files, or (not for check) local parquet file."),
        ("dataset_config_name", None, "Configuration of the dataset, where it has several."),
        ("dataset_split_name", "train", "Split of the dataset."),
        ("train_data_dir", None, "Folder of images with a metadata.jsonl that names those of a column x x_file_name."),
        ("cache_dir", None, "Where `datasets` keeps what it downloads or copies."),
    )
    images = shared_flags(image_0_column=("jpg_0", "image 0"), image_1_column=("jpg_1", "image 1"))
    uids = shared_flags(
        image_0_uid_column=("image_0_uid", "image 0's id"), image_1_uid_column=("image_1_uid", "image 1's id")
    )
    labels = shared_flags(
        label_column=("label_0", "the label, 1: image 0 wins, 0: image 1 wins, 0.5: a tie"),
        caption_column=("caption", "the caption"),
    )
    prompts = shared_flags(caption_column=("prompt", "the caption"))
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--output_dir", required=True, help="New folder for the parquet files.")
    output.add_argument(
        "--max_shard_size_mb", type=positive_int, default=500, help="MiB of a parquet file. Default: %(default)s."
    )

    parser = argparse.ArgumentParser(
        description="Check, filter and convert preference pairs.", epilog="The top of this file shows how to run each."
    )
    commands = parser.add_subparsers(metavar="check | filter | convert", required=True)

    command = commands.add_parser("check", parents=[source, images, labels], help="Report what training would meet.")
    command.set_defaults(command=check)
    add = command.add_argument
    add("--preference_probability_column", help="Column of how likely image 0 is to win, if training is to read one.")
    add("--pretrained_model_name_or_path", help="Model whose tokenizer says which captions are too long.")
    add("--revision", help="Revision of the model.")
    add("--resolution", type=positive_int, default=512, help="Name images smaller than this. Default: %(default)s.")
    threads = min(os.cpu_count(), 16)
    add("--num_proc", type=positive_int, default=threads, help="Threads that decode images. Default: %(default)s.")
    add("--max_listed", type=positive_int, default=20, help="Findings of a kind to name. Default: %(default)s.")

    command = commands.add_parser(
        "filter", parents=[source, uids, labels], help="Keep the pairs won by an absolute winner of its prompt."
    )
    command.set_defaults(command=filter_pairs)
    add = command.add_argument
    add("--output_file", required=True, help="Parquet file for the kept rows, for `convert rows`.")
    help = "Pairs that a winner must have won under its prompt; 1 (default): the authors' code, 2: the paper."
    add("--min_wins", type=positive_int, default=1, help=help)
    help = "Pair a winner with all its losers (default) or with the latest one, by row."
    add("--losers", choices=["all", "latest"], default="all", help=help)
    add("--order_column", help="What `latest` goes by instead of the row, such as created_at.")
    help = "Balance the prompts: of each, keep this many pairs, those whose winner won most often, then by row."
    add("--max_pairs_per_prompt", type=positive_int, help=help)

    sources = commands.add_parser("convert", help="Make a dataset that the trainers read.").add_subparsers(
        metavar="pairs | rankings | folders | pick_a_pic | rows", required=True
    )

    def add_conversion(name, read_candidates, help, *parents):
        conversion = sources.add_parser(name, parents=[*parents, output], help=help)
        conversion.set_defaults(command=convert, read_candidates=read_candidates)
        return conversion.add_argument

    chosen = shared_flags(chosen_column=("chosen", "the winner"), rejected_column=("rejected", "the loser"))
    add_conversion("pairs", read_pairs, "From columns of chosen and rejected images.", source, prompts, chosen)

    ranked = shared_flags(image_column=("image", "the image or images"), rank_column=("rank", "the rank or ranks"))
    help = "From several ranked images per prompt: one row per image, or a row with lists of images and ranks."
    add = add_conversion("rankings", read_rankings, help, source, prompts, ranked)
    add("--higher_is_better", action="store_true", help="The ranks are scores; otherwise 1 is the best.")
    add("--group_column", help="Column that tells rankings of the same prompt apart. Default: the caption's.")
    help = "Every two of different ranks (default), the best against the worst, or each rank against the next."
    add("--pairs", choices=["all", "best_worst", "adjacent"], default="all", help=help)

    add = add_conversion("folders", read_folders, "From two folders of same-named images, captions in text files.")
    add("--winners", required=True, help="Folder of the winners, with the captions.")
    add("--losers", required=True, help="Folder of the losers.")
    add("--caption_extension", default=".txt", help="Extension of the caption files. Default: %(default)s.")

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
    """Run a command; input that it cannot work with is an error of one line and exit code 2."""
    try:
        return args.command(args)
    except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    # What a code page lacks is escaped.
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s")
    sys.exit(main(parse_args()))
