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

"""Encodes preference pairs once, for any number of trainings, which then load neither VAE nor text encoders.

    accelerate launch tools/encode_preferences.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --dataset_name kashif/pickascore --dataset_split_name validation --mixed_precision bf16 --output_dir encoded
    accelerate launch train_ncp_dpo_sdxl.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --encoded_data_dir encoded --mixed_precision bf16 ...

Takes the trainers' flags of model and data, reads as they read and encodes in their precision; SD 1.x and 2.x are told from
SDXL by the checkpoint. Parquet files on the hub are read in order where they are, only as far as `--max_train_samples` asks.
The same command goes on where an earlier one was interrupted. Several processes, also on several machines that share
`--output_dir`, share the work. `--output_dir` can be uploaded as a dataset; its README.md says how to read it.
"""

import argparse
import bisect
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs
from datasets import Dataset, Features, Value
from datasets.table import table_cast
from torch.utils.data import default_collate
from tqdm.auto import tqdm

import diffusers


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_ncp_dpo_sd15  # noqa: E402
import train_ncp_dpo_sdxl  # noqa: E402
from train_ncp_dpo_sd15 import (  # noqa: E402
    COUNT,
    check_columns,
    digest_of_pairs,
    one_line,
    pair_features,
    synchronize,
    winner_probability,
)


logger = get_logger(__name__)

# Pairs or prompts of a file, which are held in memory until it is written.
SHARD_SIZE = 256
PAIRS = Features(
    {
        "row": Value("int64"),
        "label": Value("float64"),
        "caption": Value("string"),
        "winner_probability": Value("float64"),
        "prompt": Value("int64"),
        "tensors": Value("binary"),
    }
)
PROMPTS = Features({"caption": Value("string"), "tensors": Value("binary")})
# What a folder is encoded by: another run that writes into it must have the same.
SETTINGS = """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant mixed_precision allow_tf32
    resolution image_interpolation_mode no_hflip image_0_column image_1_column label_column caption_column
    preference_probability_column dataset_name dataset_config_name dataset_split_name train_data_dir max_train_samples
""".split()
README = """---
configs:
- config_name: pairs
  data_files: pairs/*.arrow
- config_name: prompts
  data_files: prompts/*.arrow
---

Preference pairs, encoded by `tools/encode_preferences.py`; `encoding.json` says by what, and which script trains on them.

`safetensors.torch.load(row["tensors"])` gives a row's tensors. Of a pair: scaled `latents` of shape (2, orientations, C, h, w) and,
for SDXL, `time_ids` of shape (2, orientations, 6): the winner, then the loser, each as it is and, unless `no_hflip`, flipped
horizontally. Of a prompt: its text embeddings. A pair's `prompt` is the number of its caption's row in `prompts`, its `row` that of
the pair in the source, its `label` 1 if the source's first image won and 0 if the second did, and its `winner_probability`, where the
source has such a column, how sure that is.
"""


# Arguments


def create_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    train_ncp_dpo_sd15.add_shared_arguments(parser)
    add = parser.add_argument_group("encoding").add_argument
    precision = "Precision that training will use. Default: accelerate's configuration."
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help=precision)
    add("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs use TF32 in fp32.")
    add("--num_workers", type=COUNT, default=4, help="Threads that read and decode images.")
    add("--output_dir", required=True, help="Where everything is written: a new folder, or one to go on with.")
    # What the trainers' functions read beside is as in a training without further flags, for which no loss matters.
    unsaid = vars(train_ncp_dpo_sd15.create_parser().parse_args(["--pretrained_model_name_or_path", ""]))
    parser.set_defaults(**{**unsaid, "resolution": None, "loss_space": "latent", "report_to": "none"})
    return parser


def parse_args(input_args=None):
    args = create_parser().parse_args(input_args)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("Give exactly one of --dataset_name and --train_data_dir.")
    train_ncp_dpo_sd15.check_arguments(args)
    return args


def choose_trainer(args):
    """The module of the script that trains the checkpoint, whose `check_checkpoint` says so if neither does."""
    if Path(args.pretrained_model_name_or_path).is_file():
        return train_ncp_dpo_sd15
    kind = train_ncp_dpo_sd15.load_config(args, "unet").get("addition_embed_type")
    return train_ncp_dpo_sdxl if kind == train_ncp_dpo_sdxl.ADDITION_EMBED_TYPE else train_ncp_dpo_sd15


def create_accelerator(args):
    """Sets up accelerate and logging as the trainers do."""
    # Whoever is done first waits for the others, by default for no longer than minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    args.mixed_precision = accelerator.mixed_precision
    log_format = "%(asctime)s - %(levelname)s - %(name)s - %(message)s"
    logging.basicConfig(format=log_format, datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO)
    if not accelerator.is_local_main_process:
        for library in (datasets.utils, transformers.utils, diffusers.utils):
            library.logging.set_verbosity_error()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


# Reading in order


def map_ahead(pool, function, items, ahead):
    """`function` of every item, in order, computed by the threads of `pool` for up to `ahead` items that come next."""
    futures = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


class ParquetFiles:
    """
    The rows of parquet files at URLs, read in order where they are. `data` is the table of labels and captions, of no more files
    than `--max_train_samples` asks for. A `ValueError` names the file that cannot be read.
    """

    def __init__(self, args, urls, pool):
        self.args, self.pool, self.features = args, pool, pair_features(args)
        self.groups, tables, num_rows, num_pairs = [], [], 0, 0
        columns = [name for name, feature in self.features.items() if not isinstance(feature, datasets.Image)]
        for url, (table, metadata) in zip(
            urls, map_ahead(pool, lambda url: self.read_table(url, columns), urls, args.num_workers)
        ):
            for index in range(metadata.num_row_groups):
                self.groups.append((num_rows, url, metadata, index))
                num_rows += metadata.row_group(index).num_rows
            tables.append(table)
            num_pairs += sum(label != 0.5 for label in table[args.label_column].to_pylist())
            if args.max_train_samples is not None and num_pairs >= args.max_train_samples:
                break
        self.data = pa.concat_tables(tables)

    def read_table(self, url, columns, metadata=None, group=None):
        """Columns of a file or of one of its row groups, as training takes them, and the metadata of the file."""
        try:
            filesystem, path = fsspec.url_to_fs(url)
            # pyarrow itself joins what lies close together, and reads nothing twice.
            with filesystem.open(path, "rb", cache_type="none") as file:
                parquet = pq.ParquetFile(file, metadata=metadata, pre_buffer=True)
                check_columns(self.args, parquet.schema_arrow)
                table = parquet.read(columns) if group is None else parquet.read_row_group(group, columns)
            schema = Features({name: self.features[name] for name in columns}).arrow_schema
            return table_cast(table, schema), parquet.metadata
        except (OSError, TypeError, ValueError, pa.ArrowException) as error:
            message = f"--dataset_name {self.args.dataset_name} cannot be read: {url} {one_line(error)}"
            raise ValueError(message) from error

    def read(self, rows):
        """`(row, values)` of rows, ascending; no more than two row groups are in memory."""
        wanted = []
        for start, url, metadata, index in self.groups:
            end = start + metadata.row_group(index).num_rows
            if these := rows[bisect.bisect_left(rows, start) : bisect.bisect_left(rows, end)]:
                wanted.append((start, these, (url, list(self.features), metadata, index)))
        tables = map_ahead(self.pool, lambda group: self.read_table(*group[2]), wanted, 1)
        for (start, these, _), (table, _) in zip(wanted, tables):
            for row in these:
                yield row, table.slice(row - start, 1).to_pylist()[0]


def find_remote_files(args):
    """The URLs of a split that is parquet files on the hub, or none; a `ValueError` if the hub cannot be read."""
    if args.train_data_dir is not None or os.path.exists(args.dataset_name):
        return []
    try:
        builder = datasets.load_dataset_builder(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"--dataset_name {args.dataset_name} cannot be read: {one_line(error)}") from error
    files = list((builder.config.data_files or {}).get(args.dataset_split_name, []))
    if files and all("://" in file and file.endswith(".parquet") for file in files):
        return files
    logger.warning(f"--dataset_name {args.dataset_name} is no parquet files on the hub: it is read from a copy")
    return []


def open_source(args, trainer, pool):
    """What `find_rows` takes, and a function that gives `(row, values)` of ascending rows."""
    if urls := find_remote_files(args):
        files = ParquetFiles(args, urls, pool)
        return files, files.read
    dataset = trainer.load_dataset(args)
    return dataset, lambda rows: ((row, dataset[row]) for row in rows)


# The folder


@contextlib.contextmanager
def whole_file(path):
    """Where to write a file that appears whole or not at all."""
    incomplete = path.with_name(f"{path.name}.incomplete")
    yield incomplete
    synchronize(incomplete)
    os.replace(incomplete, path)


def describe(args, trainer, vae_config, dtype, num_rows, pairs, num_prompts):
    """`encoding.json`: by what the pairs, `(rows, labels, captions)`, are encoded, and what that makes."""
    shards = {"num_pairs": len(pairs[0]), "num_prompts": num_prompts}
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "crop": "center",
        "vae_scaling_factor": vae_config["scaling_factor"],
        "trainer": Path(trainer.__file__).name,
        "latents_dtype": str(dtype).removeprefix("torch."),
        "num_rows": num_rows,
        **shards,
        **{f"{name}_shards": math.ceil(number / SHARD_SIZE) for name, number in shards.items()},
        **digest_of_pairs(*pairs),
    }


def open_folder(folder, encoding):
    """Starts the folder, or goes on with one; a `ValueError` if it is somebody else's or of other settings or data."""
    path = folder / "encoding.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in encoding.items():
            if saved.get(name) != value:
                flag = f"--{name}" if name in SETTINGS else name
                was = f"{folder} was encoded with {saved.get(name)!r}"
                raise ValueError(f"{flag} is {value!r}, but {was}. Give another --output_dir.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        if others := [other.name for other in folder.iterdir() if other.name != f"{path.name}.incomplete"]:
            raise ValueError(f"--output_dir {folder} holds no encoding.json, but {one_line(', '.join(others))}.")
        with whole_file(path) as incomplete:
            incomplete.write_text(json.dumps(encoding, indent=2) + "\n", encoding="utf-8")
    if not (folder / "README.md").exists():
        with whole_file(folder / "README.md") as incomplete:
            incomplete.write_text(README, encoding="utf-8")
    for kind in ("pairs", "prompts"):
        (folder / kind).mkdir(exist_ok=True)


def list_shards(folder, kind, encoding):
    """The paths of the files of a kind, there or not, and which pairs or prompts each holds."""
    number, total = encoding[f"num_{kind}"], encoding[f"num_{kind}_shards"]
    paths = [folder / kind / f"{index:05}-of-{total:05}.arrow" for index in range(total)]
    starts = range(0, number, SHARD_SIZE)
    return [(path, slice(start, min(start + SHARD_SIZE, number))) for path, start in zip(paths, starts)]


def write_shard(path, features, records):
    schema = features.arrow_schema
    with whole_file(path) as incomplete, pa.OSFile(str(incomplete), "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(pa.Table.from_pylist(records, schema))


def report(folder, encoding, seconds):
    """Says what the folder holds; a `RuntimeError` if a file is missing, a `ValueError` if no pair was readable."""
    held, size = {}, 0
    for kind in ("pairs", "prompts"):
        paths = [path for path, _ in list_shards(folder, kind, encoding)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise RuntimeError(f"{folder / kind} lacks {one_line(', '.join(missing))}: do all machines share it?")
        held[kind] = sum(len(Dataset.from_file(str(path))) for path in paths)
        size += sum(path.stat().st_size for path in paths)
    what = f"{held['pairs']} pairs and {held['prompts']} prompts, {size / 1e9:.3g} GB"
    logger.info(f"{folder} holds {what}, after {timedelta(seconds=round(seconds))}")
    # Of earlier runs as well, whose shards lack them.
    if skipped := encoding["num_pairs"] - held["pairs"]:
        logger.warning(f"{skipped} unreadable pairs were left out")
    if not held["pairs"]:
        raise ValueError(f"No pair is left: all {skipped} are unreadable.")


# Encoding


def batched(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def encode_prompts(args, trainer, pipeline, shards, captions):
    """Writes shards of captions' embeddings, in the dtype that text encoders give."""
    for path, part in shards:
        records = []
        for batch in batched(captions[part], args.vae_encode_batch_size):
            embeddings = {name: value.cpu() for name, value in trainer.encode_prompt(pipeline, batch).items()}
            for index, caption in enumerate(batch):
                tensors = {name: value[index].contiguous() for name, value in embeddings.items()}
                records.append({"caption": caption, "tensors": safetensors.torch.save(tensors)})
        write_shard(path, PROMPTS, records)


def decode_pair(args, trainer, pair):
    """`(row, values, tensors)`, of the winner and the loser in all orientations, or `None` for a pair to be skipped."""
    row, values = pair
    try:
        images = trainer.read_images(args, row, values)
    except trainer.UnreadableImage as error:
        if args.on_bad_sample == "error":
            raise
        logger.warning(f"{error}. The pair is left out", main_process_only=False)
        return None
    flips = (False,) if args.no_hflip else (False, True)
    tensors = [trainer.preprocess_image(image, args, (0.5, 0.5), flip) for image in images for flip in flips]
    return row, values, default_collate(tensors)


def encode_pairs(args, trainer, pipeline, dtype, shards, pairs, prompts):
    """Writes shards of pairs' latents; `pairs` are what `decode_pair` gives of all rows of the shards, one by one."""
    images_per_pair = 2 if args.no_hflip else 4
    # As few pairs as fill batches of images. They end with the shard, so that nothing depends on who encodes which shards.
    pairs_per_batch = math.lcm(images_per_pair, args.vae_encode_batch_size) // images_per_pair
    for path, part in shards:
        records = []
        readable = filter(None, itertools.islice(pairs, part.stop - part.start))
        for batch in batched(readable, pairs_per_batch):
            pixel_values = torch.cat([tensors.pop("pixel_values") for _, _, tensors in batch])
            latents = trainer.encode_images(pipeline.vae, pixel_values, args.vae_encode_batch_size)
            latents = latents.to(dtype).cpu().split(images_per_pair)
            for (row, values, others), own in zip(batch, latents):
                label, caption = values[args.label_column], values[args.caption_column]
                tensors = {"latents": own, **others}
                tensors = {name: value.unflatten(0, (2, -1)).contiguous() for name, value in tensors.items()}
                record = {"row": row, "label": label, "caption": caption, "prompt": prompts[caption]}
                if args.preference_probability_column is not None:
                    record["winner_probability"] = winner_probability(args, values)
                records.append({**record, "tensors": safetensors.torch.save(tensors)})
        write_shard(path, PAIRS, records)


def open_pairs(args, trainer, pool):
    """A function that reads rows in order, and the chosen ones' numbers, labels and captions; also how many rows there are."""
    source, read = open_source(args, trainer, pool)
    rows = trainer.find_rows(args, source)
    columns = (source.data.column(name) for name in (args.label_column, args.caption_column))
    return read, (rows, *(column.take(pa.array(rows)).to_pylist() for column in columns)), len(source.data)


def main(args):
    start, trainer, folder = time.monotonic(), choose_trainer(args), Path(args.output_dir)
    args.resolution = args.resolution or trainer.DEFAULTS["resolution"]
    accelerator = create_accelerator(args)
    dtype = torch.float32 if accelerator.mixed_precision == "no" else torch.float16
    _, vae_config, _ = trainer.check_checkpoint(args)

    with ThreadPoolExecutor(args.num_workers) as pool:
        with accelerator.main_process_first():
            read, pairs, num_rows = open_pairs(args, trainer, pool)
            rows, _, captions = pairs
            prompts = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
            encoding = describe(args, trainer, vae_config, dtype, num_rows, pairs, len(prompts))
            open_folder(folder, encoding)

        missing = {}
        for kind in ("prompts", "pairs"):
            mine = list_shards(folder, kind, encoding)[accelerator.process_index :: accelerator.num_processes]
            missing[kind] = [(path, part) for path, part in mine if not path.exists()]
        if any(missing.values()):
            pipeline = trainer.load_pipeline(args, accelerator, unet=None)
            encode_prompts(args, trainer, pipeline, missing["prompts"], list(prompts))
            wanted = [row for _, part in missing["pairs"] for row in rows[part]]
            decode = functools.partial(decode_pair, args, trainer)
            decoded = map_ahead(pool, decode, read(wanted), 2 * args.num_workers)
            bar = tqdm(decoded, total=len(wanted), desc="Pairs", disable=not accelerator.is_local_main_process)
            encode_pairs(args, trainer, pipeline, dtype, missing["pairs"], iter(bar), prompts)
        elif accelerator.num_processes == 1:
            # Of several, others may have something left.
            logger.info(f"Nothing is left to encode: {folder} holds all of it already")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(folder, encoding, time.monotonic() - start)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
