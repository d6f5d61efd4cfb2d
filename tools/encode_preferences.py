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

r"""Encodes preference pairs once. Any number of trainings can use the result and load neither VAE nor text encoders.

    accelerate launch tools/encode_preferences.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --dataset_name kashif/pickascore --dataset_split_name validation --mixed_precision bf16 --output_dir encoded
    accelerate launch train_ncp_dpo_sdxl.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --encoded_data_dir encoded --mixed_precision bf16 --output_dir ncp-dpo-sdxl

The tool has the trainers' flags of model and data, reads pairs as they do and encodes in their precision. The checkpoint says
whether the model is SDXL. Parquet files on the hub are read in order where they are, and no more of them than
`--max_train_samples` needs. The same command continues an interrupted encoding, encodes images again that were replaced since,
and those that could not be read and now can. Several processes, also on several machines that share `--output_dir`, share the
work. `--output_dir` can be uploaded as a dataset. Its README.md says how to read it.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import safetensors.torch
import torch
from common import (
    LOCK_NAME,
    ArgumentParser,
    end_with_parent,
    locked_folder,
    map_ahead,
    open_files,
    read_files,
    run,
    whole_file,
)
from datasets import Dataset, Features, Value
from torch.utils.data import default_collate
from tqdm.auto import tqdm


# `common` makes the repository's modules importable. The trainers are imported where they are used: it takes seconds.
import preference_pairs  # isort: skip


logger = logging.getLogger("encode_preferences")

# Pairs or prompts per file. They are held in memory until it is written.
SHARD_SIZE = 256
PAIRS = Features(
    {
        "row": Value("int64"),
        "label": Value("float64"),
        "caption": Value("string"),
        "winner_probability": Value("float64"),
        "prompt": Value("int64"),
        "digest_0": Value("string"),
        "digest_1": Value("string"),
        "tensors": Value("binary"),
    }
)
PROMPTS = Features({"caption": Value("string"), "tensors": Value("binary")})
# A run that continues an encoding must have the same values.
SETTINGS = """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant mixed_precision allow_tf32
    resolution image_interpolation_mode no_hflip image_0_column image_1_column label_column caption_column
    preference_probability_column dataset_name dataset_config_name dataset_split_name train_data_dir max_train_samples
""".split()
# These say where models and data are. What they hold is compared in their place.
PLACES = (
    *preference_pairs.MODEL_ARGUMENTS,
    *("dataset_name", "dataset_config_name", "dataset_split_name", "train_data_dir"),
)
README = """---
configs:
- config_name: pairs
  data_files: pairs/*.arrow
- config_name: prompts
  data_files: prompts/*.arrow
---

Preference pairs, encoded by `tools/encode_preferences.py`. `encoding.json` holds the settings and the script that trains on them.

`safetensors.torch.load(row["tensors"])` gives a row's tensors. A pair has scaled `latents` of shape (2, orientations, C, h, w) and,
for SDXL, `time_ids` of shape (2, orientations, 6). The first axis is the winner, then the loser. The second axis is each image as it
is and, unless `no_hflip`, flipped horizontally. A prompt has its text embeddings. A pair's `prompt` is the number of its caption's
row in `prompts`, and its `row` is the number of the pair in the source. Its `label` is 1 if the source's first image won and 0 if
the second did. Its `winner_probability` is the probability that the winner wins, if the source has such a column. `digest_0` and
`digest_1` are the SHA-256 of the source's first and second image.
"""


# Arguments


def create_parser():
    parser = ArgumentParser(description=__doc__)
    preference_pairs.add_arguments(parser)
    add = parser.add_argument_group("encoding").add_argument
    precision = "Precision that training will use. Default: accelerate's configuration."
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help=precision)
    add("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs use TF32 in fp32.")
    workers = "Threads that read and decode images."
    add("--num_workers", type=preference_pairs.COUNT, default=4, help=workers)
    add("--output_dir", required=True, help="Folder for all output: a new one, or that of an interrupted encoding.")
    return parser


def parse_args(input_args=None):
    args = create_parser().parse_args(input_args)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("Give exactly one of --dataset_name and --train_data_dir.")
    import train_ncp_dpo_sd15

    # The trainers' functions read other arguments too. They get their defaults, and the loss does not matter.
    others = vars(train_ncp_dpo_sd15.create_parser().parse_args(["--pretrained_model_name_or_path", ""]))
    args = argparse.Namespace(**{**others, "loss_space": "latent", "report_to": "none", **vars(args)})
    train_ncp_dpo_sd15.check_arguments(args)
    return args


def choose_trainer(args):
    """The module of the script that trains the checkpoint. If none does, its `check_checkpoint` says so."""
    import train_ncp_dpo_sd15
    import train_ncp_dpo_sdxl

    if Path(args.pretrained_model_name_or_path).is_file():
        return train_ncp_dpo_sd15
    embed_type = train_ncp_dpo_sd15.load_config(args, "unet").get("addition_embed_type")
    return train_ncp_dpo_sdxl if embed_type == train_ncp_dpo_sdxl.ADDITION_EMBED_TYPE else train_ncp_dpo_sd15


def create_accelerator(args):
    """Sets up accelerate and logging as the trainers do."""
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    import diffusers

    # The first process to finish waits for the others. The default limit is some minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    args.mixed_precision = accelerator.mixed_precision
    log_format = "%(asctime)s - %(levelname)s - %(name)s - %(message)s"
    logging.basicConfig(format=log_format, datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO)
    if not accelerator.is_main_process:
        logger.setLevel(logging.WARNING)
    if not accelerator.is_local_main_process:
        for library in (datasets.utils, transformers.utils, diffusers.utils):
            library.logging.set_verbosity_error()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


# Reading in order


def find_remote_files(args):
    """The URLs of the split's files if they are parquet files on the hub, else none. A `ValueError` if the hub fails."""
    if args.train_data_dir is not None or os.path.exists(args.dataset_name):
        return []
    try:
        builder = datasets.load_dataset_builder(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        reason = preference_pairs.one_line(error)
        raise ValueError(f"--dataset_name {args.dataset_name} cannot be read: {reason}") from error
    files = list((builder.config.data_files or {}).get(args.dataset_split_name, []))
    if files and all("://" in file and file.endswith(".parquet") for file in files):
        return files
    logger.warning(f"--dataset_name {args.dataset_name} is not made of parquet files on the hub: a copy is read")
    return []


class Source(NamedTuple):
    """The pairs to encode."""

    read: Callable  # yields `(row number, row)` of ascending row numbers
    rows: list
    labels: list
    captions: list
    probabilities: list  # of the winners, or `None`
    images: str | None  # a digest of the files that hold them
    num_rows: int  # with ties
    is_remote: bool  # parquet files on the hub


def open_source(args, pool):
    if urls := find_remote_files(args):
        files, dataset = open_files(args, urls, pool, args.num_workers)
        read = functools.partial(read_files, files)
    else:
        dataset = preference_pairs.load_dataset(args)

        def read(rows):
            return ((row, dataset[row]) for row in rows)

    rows = preference_pairs.find_rows(args, dataset)
    pairs = dataset.select(rows)
    columns = preference_pairs.columns_of(args, pairs)
    images = preference_pairs.digest_images(args, dataset)
    return Source(read, rows, *columns, images, len(dataset), is_remote=bool(urls))


# The folder


def write_text(path, text):
    from train_ncp_dpo_sd15 import synchronize

    with whole_file(path) as incomplete:
        incomplete.write_text(text, encoding="utf-8")
        synchronize(incomplete)


def describe(args, trainer, vae_config, dtype, source, num_prompts):
    """The content of `encoding.json`."""
    counts, models = {"num_pairs": len(source.rows), "num_prompts": num_prompts}, preference_pairs.digest_models(args)
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "crop": "center",
        "vae_scaling_factor": vae_config["scaling_factor"],
        "trainer": Path(trainer.__file__).name,
        "latents_dtype": str(dtype).removeprefix("torch."),
        "num_rows": source.num_rows,
        **counts,
        **{f"{name}_shards": math.ceil(number / SHARD_SIZE) for name, number in counts.items()},
        **preference_pairs.digest_of_pairs(
            source.rows, source.labels, source.captions, source.probabilities, source.images
        ),
        "models": {part: digest for part, digest in models.items() if re.match("vae|text_encoder|tokenizer", part)},
    }


def check_folder(folder):
    """A `ValueError` if something else than this tool wrote to the folder."""
    if (folder / "encoding.json").is_file() or not folder.is_dir():
        return
    if others := [path.name for path in folder.iterdir() if path.name not in ("encoding.json.incomplete", LOCK_NAME)]:
        names = preference_pairs.one_line(", ".join(others))
        raise ValueError(f"--output_dir {folder} holds {names}, but no encoding.json. Give a new folder.")


def check_encoding(folder, encoding, saved):
    """A `ValueError` if the folder has the `saved` encoding of other settings, data or models."""
    is_older = "models" not in saved
    unknown = {"models", "images", *({"probabilities"} - saved.keys())}
    for name, value in encoding.items():
        if name not in unknown and (is_older or name not in PLACES) and saved.get(name) != value:
            flag = f"--{name}" if name in SETTINGS else name
            raise ValueError(
                f"{flag} is {value!r}, but {folder} was encoded with {saved.get(name)!r}. Give another --output_dir."
            )
    if is_older:
        logger.warning(f"{folder} does not say which files it was made of: replaced ones are not noticed")
    elif others := [part for part, digest in encoding["models"].items() if digest != saved["models"].get(part)]:
        name, parts = encoding["pretrained_model_name_or_path"], ", ".join(others)
        raise ValueError(
            f"--pretrained_model_name_or_path {name}: {parts} changed since {folder} was encoded. Give another --output_dir."
        )


def open_folder(args, folder, encoding, source):
    """Starts or continues the folder. Returns whether images have changed since it was written."""
    path = folder / "encoding.json"
    saved, images_changed = None, False
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        check_encoding(folder, encoding, saved)
        images_changed = saved.get("images", source.images) != source.images
        if images_changed and source.is_remote:
            name = f"--dataset_name {args.dataset_name}"
            raise ValueError(f"{name} changed since {folder} was encoded. Give another --output_dir.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_encoding(folder, encoding)
    if not (folder / "README.md").exists():
        write_text(folder / "README.md", README)
    for part in ("pairs", "prompts"):
        (folder / part).mkdir(exist_ok=True)
    return images_changed


def write_encoding(folder, encoding):
    write_text(folder / "encoding.json", json.dumps(encoding, indent=2) + "\n")


def find_stale_shards(args, shards, source, images_changed, pool):
    """Those of the existing files of pairs that hold an image that was replaced since, or lack a pair that can be read now."""

    def find_new_pair(shard):
        path, place = shard
        stored = Dataset.from_file(str(path))
        digests = dict.fromkeys(stored["row"])
        if images_changed:
            digests = dict(zip(stored["row"], zip(stored["digest_0"], stored["digest_1"])))
        rows = [row for row in source.rows[place] if images_changed or row not in digests]
        for row_number, row in source.read(rows):
            if row_number in digests:
                is_new = digests[row_number] != preference_pairs.digest_pair(args, row)
            else:
                is_new = is_readable(args, row_number, row)
            if is_new:
                return row_number

    shards, stale = [shard for shard in shards if shard[0].exists()], []
    for shard, row_number in zip(shards, pool.map(find_new_pair, shards)):
        if row_number is not None:
            logger.warning(f"Row {row_number} has other images than when {shard[0]} was encoded: it is encoded again")
            stale.append(shard)
    return stale


def list_shards(folder, part, encoding):
    """The paths of a part's files, whether they exist or not, each with the slice of the pairs or prompts in it."""
    count, num_shards = encoding[f"num_{part}"], encoding[f"num_{part}_shards"]
    paths = [folder / part / f"{index:05}-of-{num_shards:05}.arrow" for index in range(num_shards)]
    starts = range(0, count, SHARD_SIZE)
    return [(path, slice(start, min(start + SHARD_SIZE, count))) for path, start in zip(paths, starts)]


def write_shard(path, features, records):
    from train_ncp_dpo_sd15 import synchronize

    schema = features.arrow_schema
    with whole_file(path) as incomplete:
        with pa.OSFile(str(incomplete), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(pa.Table.from_pylist(records, schema))
        synchronize(incomplete)


def report(folder, encoding, seconds):
    """Logs what the folder holds. A `ValueError` if a file is missing or no pair was readable."""
    counts, size = {}, 0
    for part in ("pairs", "prompts"):
        paths = [path for path, _ in list_shards(folder, part, encoding)]
        if missing := [path.name for path in paths if not path.exists()]:
            names = preference_pairs.one_line(", ".join(missing))
            raise ValueError(f"{folder / part} lacks {names}. All machines must share --output_dir.")
        counts[part] = sum(len(Dataset.from_file(str(path))) for path in paths)
        size += sum(path.stat().st_size for path in paths)
    duration = timedelta(seconds=round(seconds))
    logger.info(
        f"{folder} holds {counts['pairs']} pairs and {counts['prompts']} prompts, {size / 1e9:.3g} GB, after {duration}"
    )
    # Earlier runs may have left pairs out too. Their files lack them.
    skipped = encoding["num_pairs"] - counts["pairs"]
    if skipped:
        logger.warning(f"{skipped} unreadable pairs were left out")
    if not counts["pairs"]:
        raise ValueError(f"No pair is left: all {skipped} are unreadable.")


# Encoding


def batched(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def check_finite(args, encoding, names):
    """Raises a `ValueError` with the name of the first row of a tensor that holds values that are not finite."""
    for name, finite in zip(names, encoding.isfinite().flatten(1).all(dim=1).tolist()):
        if not finite:
            raise ValueError(
                f"{name} has an encoding with values that are not finite: --pretrained_model_name_or_path "
                f"{args.pretrained_model_name_or_path}, or its VAE, overflows at --mixed_precision {args.mixed_precision}. "
                "Give --mixed_precision no or another model."
            )


def encode_prompts(args, trainer, pipeline, shards, captions):
    """Writes shards of captions' embeddings, in the text encoders' dtype."""
    for path, part in shards:
        records = []
        for batch in batched(captions[part], args.vae_encode_batch_size):
            embeddings = {name: value.cpu() for name, value in trainer.encode_prompt(pipeline, batch).items()}
            for value in embeddings.values():
                check_finite(args, value, [f"Prompt {caption!r:.80}" for caption in batch])
            for index, caption in enumerate(batch):
                tensors = {name: value[index].contiguous() for name, value in embeddings.items()}
                records.append({"caption": caption, "tensors": safetensors.torch.save(tensors)})
        write_shard(path, PROMPTS, records)


def is_readable(args, row_number, row):
    try:
        list(preference_pairs.read_images(args, row_number, row))
    except preference_pairs.InputError:
        return False
    return True


def decode_pair(args, has_time_ids, pair):
    """`(row number, row, digests, tensors)`. The tensors hold the winner and the loser in all orientations. `None` skips the
    pair."""
    row_number, row = pair
    try:
        images = list(preference_pairs.read_images(args, row_number, row))
    except preference_pairs.InputError as error:
        if args.on_bad_sample == "error":
            raise
        logger.warning(f"{error}. The pair is left out")
        return None
    flips = (False,) if args.no_hflip else (False, True)
    views = [preference_pairs.preprocess_image(image, args, (0.5, 0.5), flip) for image in images for flip in flips]
    tensors = default_collate(views)
    if not has_time_ids:
        del tensors["time_ids"]
    return row_number, row, preference_pairs.digest_pair(args, row), tensors


def encode_pairs(args, trainer, pipeline, dtype, shards, pairs, prompts):
    """Writes shards of pairs' latents. `pairs` are the results of `decode_pair` for all rows of the shards."""
    images_per_pair = 2 if args.no_hflip else 4
    # The fewest pairs that fill batches of images. A batch ends with its shard, so that no result depends on which
    # process encodes which shards.
    pairs_per_batch = math.lcm(images_per_pair, args.vae_encode_batch_size) // images_per_pair
    for path, part in shards:
        records = []
        readable = filter(None, itertools.islice(pairs, part.stop - part.start))
        for batch in batched(readable, pairs_per_batch):
            pixel_values = torch.cat([tensors.pop("pixel_values") for *_, tensors in batch])
            latents = trainer.encode_images(pipeline.vae, pixel_values, args.vae_encode_batch_size)
            latents = latents.to(dtype).cpu().unflatten(0, (-1, images_per_pair))
            names = [f"Row {row_number} ({row[args.caption_column]!r:.80})" for row_number, row, *_ in batch]
            check_finite(args, latents, names)
            for (row_number, row, digests, tensors), pair_latents in zip(batch, latents):
                tensors = {"latents": pair_latents, **tensors}
                tensors = {name: value.unflatten(0, (2, -1)).contiguous() for name, value in tensors.items()}
                caption = row[args.caption_column]
                record = {"row": row_number, "label": row[args.label_column], "caption": caption}
                record["winner_probability"] = preference_pairs.winner_probability(args, row)
                record |= {"prompt": prompts[caption], "tensors": safetensors.torch.save(tensors)}
                record |= {"digest_0": digests[0], "digest_1": digests[1]}
                records.append(record)
        if not records and path.exists():
            logger.warning(f"{path} is kept as it is: none of its pairs can be read now")
            continue
        write_shard(path, PAIRS, records)


def main(args):
    trainer, folder = choose_trainer(args), Path(args.output_dir)
    accelerator = create_accelerator(args)
    _, vae_config, _ = trainer.check_checkpoint(args)
    logger.info(f"Encoding at --resolution {args.resolution}")
    check_folder(folder)
    with locked_folder(folder, accelerator.is_main_process):
        encode(args, accelerator, trainer, vae_config, folder)
    accelerator.end_training()


def encode(args, accelerator, trainer, vae_config, folder):
    start, dtype = time.monotonic(), torch.float32 if accelerator.mixed_precision == "no" else torch.float16
    with ThreadPoolExecutor(args.num_workers) as pool:
        with accelerator.main_process_first():
            source = open_source(args, pool)
            prompts = {caption: number for number, caption in enumerate(dict.fromkeys(source.captions))}
            encoding = describe(args, trainer, vae_config, dtype, source, len(prompts))
            images_changed = open_folder(args, folder, encoding, source)

        missing = {}
        for part in ("prompts", "pairs"):
            shards = list_shards(folder, part, encoding)[accelerator.process_index :: accelerator.num_processes]
            missing[part] = [(path, place) for path, place in shards if not path.exists()]
            if part == "pairs" and not source.is_remote:
                # A file is replaced when its successor is whole, so that images that are away for a while cost nothing.
                missing[part] += find_stale_shards(args, shards, source, images_changed, pool)
                missing[part].sort()
        if any(missing.values()):
            pipeline = trainer.load_pipeline(args, accelerator, unet=None)
            encode_prompts(args, trainer, pipeline, missing["prompts"], list(prompts))
            rows_to_read = [row for _, place in missing["pairs"] for row in source.rows[place]]
            decode = functools.partial(decode_pair, args, trainer.ADDITION_EMBED_TYPE is not None)
            decoded = map_ahead(pool, decode, source.read(rows_to_read), 2 * args.num_workers)
            bar = tqdm(decoded, total=len(rows_to_read), desc="Pairs", disable=not accelerator.is_local_main_process)
            encode_pairs(args, trainer, pipeline, dtype, missing["pairs"], iter(bar), prompts)
        elif accelerator.num_processes == 1:
            # Other processes may have something left.
            logger.info(f"Nothing is left to encode: {folder} is complete")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if images_changed:
            # Not before: an interrupted run must find the other files that are not of these images.
            write_encoding(folder, encoding)
        report(folder, encoding, time.monotonic() - start)


if __name__ == "__main__":
    end_with_parent(if_launched=True)
    run(main, parse_args)
