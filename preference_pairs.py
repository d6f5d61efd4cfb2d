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

"""Preference pairs, from a dataset's row to a batch. Digests of what a run depends on come last.

Training reads an endless stream of N pairs: number i is the pair at place i mod N of the order of epoch i div N. A
pair's timestep, noise, flip and crop depend on the run's seed, the epoch and the row. They do not depend on the number
of processes or workers, or on a resume. What cannot be trained on raises an `InputError`."""

import argparse
import atexit
import contextlib
import copy
import hashlib
import io
import itertools
import json
import logging
import os
import re
import signal
import unicodedata
import warnings
from pathlib import Path

import datasets
import networkx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils.sha import sha_fileobj
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)
# Importing diffusers later warns of an uninstalled torchvision and of 4-bit kernels: nothing here uses them.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# What columns hold: a name for messages, the type in `datasets`, and a pattern of the Arrow types that can hold it.
IMAGE = "images", datasets.Image(decode=False), "binary|string|struct"
NUMBER = "numbers", datasets.Value("float64"), "u?int|halffloat|float|double|decimal"
TEXT = "text", datasets.Value("string"), "string"
COLUMNS = {"image_0_column": IMAGE, "image_1_column": IMAGE, "label_column": NUMBER, "caption_column": TEXT}
COLUMNS["preference_probability_column"] = NUMBER
# Training on encoded data refuses other values of these than the encoding's, and warns of other values of the hints.
ENCODING_ARGUMENTS = ("resolution", "image_interpolation_mode", "vae_scaling_factor", *COLUMNS)
ENCODING_HINTS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "mixed_precision")
MODEL_ARGUMENTS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant")
MODEL_PARTS = "model_index.json unet scheduler vae text_encoder text_encoder_2 tokenizer tokenizer_2".split()
STOP_SIGNALS = [number for number in signal.Signals if re.match("SIG(TERM|INT|HUP|USR)", number.name)]
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20  # Drawing programs store workflows there.


class InputError(ValueError):
    """Names the flag, column, file or row in which a mistake is. The scripts answer it in one line."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number_type(kind, rule, accepts):
    """A `type` for argparse, which takes a finite `int` or `float` if `accepts(value)`. `rule` is that in words."""

    def convert(text):
        if abs(value := kind(text)) < np.inf and accepts(value):
            return value
        raise argparse.ArgumentTypeError(f"{text}, but must be {rule}")

    convert.__name__ = kind.__name__  # argparse's messages name the type.
    return convert


COUNT = number_type(int, "at least 1", lambda value: value >= 1)
INDEX = number_type(int, "at least 0", lambda value: value >= 0)
POSITIVE = number_type(float, "greater than 0 and finite", lambda value: value > 0)
NOT_NEGATIVE = number_type(float, "at least 0 and finite", lambda value: value >= 0)


def add_arguments(parser):
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base model.")
    add("--pretrained_vae_model_name_or_path", help="Hub id or folder of a VAE that replaces the base model's.")
    add("--revision", help="Revision of the base model on the hub.")
    add("--variant", help="Variant of the model files, e.g. fp16.")
    add("--vae_encode_batch_size", type=COUNT, default=4, help="Images or captions to encode at once.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="Hub id, or local folder of parquet files, of preference pairs.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split_name", default="train", help="Split of the dataset.")
    add("--train_data_dir", help="Folder of images with a metadata.jsonl that gives jpg_0_file_name and so on.")
    add("--image_0_column", default="jpg_0", help="Column of the first image, bytes or image.")
    add("--image_1_column", default="jpg_1", help="Column of the second image.")
    add("--label_column", default="label_0", help="Column of 1 (the first image won), 0 (it lost) or 0.5 (a tie).")
    add("--caption_column", default="caption", help="Column of the prompt.")
    add("--preference_probability_column", help="Column of the probability, 0 to 1, that the first image wins.")
    add("--max_train_samples", type=COUNT, help="Use only the first so many pairs that have a winner.")
    add("--on_bad_sample", choices=["error", "skip"], default="error", help="What to do with unreadable pairs.")
    add("--cache_dir", help="Where downloaded datasets are stored.")
    add("--resolution", type=COUNT, help="Side of the square that images are cropped to. Default: the U-Net's own.")
    add("--no_hflip", action="store_true", help="Do not flip half of the pairs horizontally.")
    modes = [mode.name.lower() for mode in Image.Resampling]
    add("--image_interpolation_mode", choices=modes, default="lanczos", help="How images are resized.")


def one_line(text, length=200):
    text = str(text).rpartition("InputError: ")[2]  # A data worker's error begins with its traceback.
    return " ".join(text.split())[:length]


def pair_features(args):
    features = {getattr(args, flag): feature for flag, (_, feature, _) in COLUMNS.items()}
    return datasets.Features({column: feature for column, feature in features.items() if column is not None})


def check_columns(args, schema):
    """Raises an `InputError` if an Arrow schema lacks a column, or has a type that cannot hold its kind of value."""
    for flag, (kind, _, arrow_types) in COLUMNS.items():
        if (column := getattr(args, flag)) is None:
            continue
        if column not in schema.names:
            raise InputError(f"has no column {column!r} (--{flag}): there are {one_line(', '.join(schema.names))}")
        arrow_type = one_line(schema.field(column).type)
        if not re.match(f"null|(large_)?({arrow_types})", arrow_type):
            raise InputError(f"column {column} (--{flag}) is of type {arrow_type}, but must hold {kind}")


def load_dataset(args):
    """The dataset of `--dataset_name` or `--train_data_dir`, with `pair_features`. Values may be `None`."""
    if args.train_data_dir is not None:
        return load_image_folder(args)
    name, split, features = args.dataset_name, args.dataset_split_name, pair_features(args)
    options, checked_file = {"path": name, "name": args.dataset_config_name, "cache_dir": args.cache_dir}, ""
    try:
        if Path(name).is_file():
            raise InputError("it is a file: give the folder that contains it")
        if Path(name, "state.json").is_file():
            raise InputError("it was written by save_to_disk: write it with to_parquet instead")
        splits = datasets.load_dataset_builder(**options).config.data_files or {}
        wanted = list(splits) if split == "all" else re.findall(r"[A-Za-z_]\w*(?:\.\w+)*", split)  # in train+test
        if splits and not set(wanted) <= splits.keys():
            raise InputError(f"its splits (--dataset_split_name) are {', '.join(map(str, splits))}, not {split}")
        files = [file for split_name in wanted for file in splits.get(split_name, [])]
        if os.path.isdir(name):
            options["description"] = digest_files(files)  # `datasets` overlooks a replaced file of the same time.
        if files and all(file.endswith(".parquet") for file in files):
            for checked_file in [file for file in files if "://" not in file]:
                check_columns(args, pq.read_schema(checked_file))
            # With the features given, all files have these types and no other column is read.
            checked_file, options = "", {**options, "features": features, "columns": list(features)}
        dataset = datasets.load_dataset(**options, split=split)
        check_columns(args, dataset.features.arrow_schema)
        dataset = dataset.select_columns(list(features))
        if dataset.features != features:  # A cast writes the whole dataset again.
            dataset = dataset.cast(features)
        dataset.info.download_checksums = dict.fromkeys(files)  # for `digest_images`
        return dataset
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        reason = f"{checked_file} {one_line(error.__cause__ or error)}".strip()
        raise InputError(f"--dataset_name {name} cannot be read: {reason}") from error


def load_image_folder(args):
    path, features = Path(args.train_data_dir, "metadata.jsonl"), pair_features(args)
    if not path.is_file():
        raise InputError(f"--train_data_dir: there is no file {path}.")
    columns = {column: [] for column in features}
    for line_number, line in filter(lambda pair: pair[1].strip(), enumerate(path.read_bytes().split(b"\n"), start=1)):
        try:
            row = dict(json.loads(line))  # also with a byte-order mark
            for column, feature in features.items():
                is_image = isinstance(feature, datasets.Image)
                key, arrow_type = (f"{column}_file_name", pa.string()) if is_image else (column, feature.pa_type)
                if key not in row:
                    raise InputError(f"has no {key!r}, but {', '.join(row)}")
                columns[column].append(pa.scalar(row[key], arrow_type).as_py())  # refuses another type
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{path}, line {line_number}: {one_line(error)}") from error
    return datasets.Dataset.from_dict(columns, features=features)


def find_rows(args, dataset):
    """The numbers of the rows with a winner. All rows are checked."""
    names = [args.label_column, args.caption_column, args.preference_probability_column]
    columns = [dataset.data.column(name).to_pylist() for name in names if name is not None]
    for row_number, values in enumerate(zip(*columns)):
        if problem := find_problem(*values):
            raise InputError(f"Row {row_number}: {problem}.")
    rows = [row_number for row_number, label in enumerate(columns[0]) if label != 0.5]
    logger.info(f"{len(rows)} pairs with a winner; {len(dataset) - len(rows)} ties are left out")
    if not rows:
        raise InputError(f"--dataset_name or --train_data_dir: all {len(dataset)} rows are ties: none has a winner.")
    return rows[: args.max_train_samples]


def find_problem(label=1, caption="", probability=1):
    """What is wrong with a row's label, caption or preference probability, or `None`."""
    if label not in (0, 0.5, 1):
        return f"the label is {label}, but must be 1, 0, or 0.5 for a tie"
    if not isinstance(caption, str):
        return "the caption is null, but must be a text"
    if probability is None or not 0 <= probability <= 1:
        return f"the preference probability is {probability}, but must be from 0 to 1"


def read_images(args, row_number, row, winner_only=False):
    """Yields the images of a row as `read_image` returns them, the winner first."""
    columns = [args.image_0_column, args.image_1_column][:: -1 if row[args.label_column] == 0 else 1]
    for column in columns[:1] if winner_only else columns:
        try:
            yield read_image(image_bytes(args, row[column]))
        except Exception as error:  # PIL's decoders raise many kinds
            place = f"Row {row_number} ({row[args.caption_column]!r:.80}): {column}"
            raise InputError(f"{place} cannot be read as an image: {one_line(error)}") from error


def image_bytes(args, value):
    """The bytes of a dataset's `{"bytes", "path"}`. A downloaded dataset must not read other files of this machine."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise InputError("null instead of an image")
    if value["bytes"] is not None:
        return value["bytes"]
    if len(value["path"]) > 1000:
        raise InputError(f"{value['path'][:20]!r}... is text instead of an image; decode base64 first")
    source = args.train_data_dir or args.dataset_name
    caches = [args.cache_dir, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    folders = [Path(folder).resolve() for folder in ([source] if os.path.isdir(source) else caches) if folder]
    path = (folders[0] / value["path"]).resolve()
    if not any(path.is_relative_to(folder) for folder in folders):
        raise InputError(f"{one_line(value['path'], 100)} leads out of {folders[0]}")
    return path.read_bytes()


def read_image(data):
    """An upright image in sRGB, transparency on white, from encoded bytes. PIL's errors are of many kinds."""
    if not data:
        raise InputError("empty, 0 bytes")
    if (start := data[:20]).isascii() and start.decode().isprintable():
        raise InputError(f"{start.decode()!r}... is text instead of an image; decode base64 first")
    image = Image.open(io.BytesIO(data))
    if max(image.size) > 32 * min(image.size):  # The resized image would take gigabytes.
        raise InputError(f"{image.width}x{image.height} pixels, but a side must be at most 32 times the other")
    if image.format in ("AVIF", "GIF", "PNG", "WEBP") and image.is_animated:  # Others may hold a preview.
        raise InputError("an animation, but must be a single picture")
    image.load()
    icc_profile = image.info.get("icc_profile")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # PIL's parsers raise many kinds
        warnings.warn("The metadata of an image cannot be parsed and is ignored: the image is taken to be upright.")
    if image.mode.startswith(("I", "F")):
        # PIL would clip floats from 0 to 1, 16 bits, and 32 bits that hold 8 or 16.
        values = np.asarray(image).astype(np.float64)
        highest = 1 if image.mode == "F" else 255 if image.mode == "I" and values.max() <= 255 else 65535
        if not (values.min() >= 0 and values.max() <= highest):
            raise InputError(f"its values are {values.min():g} to {values.max():g}, but must be from 0 to {highest}")
        image = Image.fromarray((values * (255 / highest)).round().astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if icc_profile:
        try:
            profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)), ImageCms.createProfile("sRGB")
            is_gray = image.mode in ("1", "L", "LA") and profile.profile.xcolor_space.strip() == "GRAY"
            mode = image.mode if image.mode in ("CMYK", "LAB") else "L" if is_gray else "RGB"
            image = ImageCms.profileToProfile(image.convert(mode), profile, srgb, outputMode="RGB")
        except Exception:  # PIL raises many kinds
            warnings.warn("The colour profile of an image cannot be used and is ignored: it is taken to be sRGB.")
    image = image.convert("RGB")
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def preprocess_image(image, args, crop_position, flip):
    """`pixel_values`, the square that training sees, in uint8 of shape `(3, resolution, resolution)`, and SDXL's
    `time_ids` of shape `(6,)`. `crop_position` is (0, 0) at the image's top left and (1, 1) at its bottom right."""
    (width, height), side = image.size, args.resolution
    image = ImageOps.cover(image, (side, side), Image.Resampling[args.image_interpolation_mode.upper()])
    image = ImageOps.mirror(image) if flip else image
    top, left = round(crop_position[0] * (image.height - side)), round(crop_position[1] * (image.width - side))
    image = image.crop((left, top, left + side, top + side))
    pixel_values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    time_ids = torch.tensor([height, width, top, left, side, side], dtype=torch.float32)
    return {"pixel_values": pixel_values, "time_ids": time_ids}


def winner_probability(args, row):
    """The probability that the winner of a row wins, or `None`. The column holds that of the first image."""
    probability = row.get(args.preference_probability_column)
    return probability if probability is None or row[args.label_column] == 1 else 1 - probability


def columns_of(args, pairs):
    """The labels, the captions and the winners' probabilities, which may be `None`, of a dataset's pairs."""
    names = [name for name in (args.label_column, args.preference_probability_column) if name is not None]
    probabilities = [winner_probability(args, row) for row in pairs.select_columns(names).to_list()]
    return pairs[args.label_column][:], pairs[args.caption_column][:], probabilities


def pair_stream(rows, seed, start, stop):
    """Yields keys `(epoch, row)` of the pairs number `start` to `stop - 1` of the endless stream."""
    for epoch, numbers in itertools.groupby(range(start, stop), lambda number: number // len(rows)):
        order = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
        for number in numbers:
            yield epoch, order[number % len(rows)]


def spread_timesteps(timesteps, first, count, offset):
    """Timesteps number `first` to `first + count - 1`, `(count,)`, of a sequence that covers `timesteps`, `(T,)`,
    evenly wherever it ends: multiples of the golden ratio modulo 1, starting from `offset` in [0, 1)."""
    positions = (offset + (5**0.5 - 1) / 2 * torch.arange(first, first + count, dtype=torch.float64)) % 1
    return timesteps[(positions * len(timesteps)).long()]


class PreferencePairs(torch.utils.data.Dataset):
    """`pairs[epoch, row]` is a pair as training sees it, at one of `timesteps` and with noise of `latent_shape`,
    `(C, H, W)`. `pairs[epoch, row, timestep]` has that timestep. With `winner_only` losers are not read."""

    def __init__(self, dataset, rows, args, latent_shape, timesteps, winner_only):
        self.dataset, self.rows, self.args = dataset, rows, args
        self.latent_shape, self.timesteps, self.winner_only = latent_shape, timesteps, winner_only
        self.source = args.dataset_name or args.train_data_dir

    def __getitem__(self, key):
        epoch, row_number, *given_timestep = key
        seed = np.random.SeedSequence([self.args.seed, epoch, row_number]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        crop_position = torch.rand(2, generator=generator).tolist() if self.args.random_crop else (0.5, 0.5)
        flip = bool(torch.rand((), generator=generator) < 0.5) and not self.args.no_hflip
        timestep = self.timesteps[torch.randint(len(self.timesteps), (), generator=generator)]  # even if one is given
        noise, variance_noise = torch.randn(2, *self.latent_shape, generator=generator)
        example, skipped = None, []
        while example is None:
            try:
                example, probability = self.read(row_number, crop_position, flip)
            except InputError as error:
                skipped.append(str(error))
                if self.args.on_bad_sample == "error" or len(skipped) == len(self.rows):
                    raise
                row_number = self.rows[(self.rows.index(row_number) + 1) % len(self.rows)]
        if probability is not None:
            example["winner_probability"] = torch.tensor(probability)
        example |= {"rows": row_number, "timesteps": given_timestep[0] if given_timestep else timestep}
        return {**example, "noise": noise, "variance_noise": variance_noise, "skipped": skipped}

    def read(self, row_number, crop_position, flip):
        """The `images`, winner first, with the `caption`, and the winner's probability or `None`."""
        row = self.dataset[row_number]
        images = read_images(self.args, row_number, row, self.winner_only)
        images = [preprocess_image(image, self.args, crop_position, flip) for image in images]
        return {"images": images, "caption": row[self.args.caption_column]}, winner_probability(self.args, row)

    def columns(self):
        return columns_of(self.args, self.dataset.select(self.rows))

    def digests(self):
        rows = tqdm(self.rows, "Comparing images", disable=not logger.isEnabledFor(logging.INFO))
        return (digest_pair(self.args, self.dataset[row]) for row in rows)

    def hold_out(self, num_pairs):
        """Splits into pairs to train on and at least `num_pairs` held-out ones, which share no prompt and no image."""
        captions, graph, held_out = dict(zip(self.rows, self.columns()[1])), networkx.Graph(), set()
        for row, digests in zip(self.rows, self.digests()):
            networkx.add_star(graph, [row, same_prompt_key(captions[row]), *filter(None, digests)])
        groups = [captions.keys() & nodes for nodes in networkx.connected_components(graph)]
        groups.sort(key=lambda group: min(captions[row] for row in group))  # whatever the order of rows
        np.random.default_rng(self.args.seed).shuffle(groups)
        for group in sorted(groups, key=lambda group: len(group) > num_pairs):  # Too large ones come last.
            if len(held_out) < num_pairs:
                held_out |= group
        if held_out == captions.keys():
            counts = f"{len(captions)} pairs are {len(groups)} groups that share no caption and no image"
            raise InputError(f"--num_eval_pairs {num_pairs} leaves no pair to train on: {counts}.")
        train_pairs, eval_pairs = copy.copy(self), copy.copy(self)
        train_pairs.rows, eval_pairs.rows = sorted(captions.keys() - held_out), sorted(held_out)
        eval_pairs.winner_only = False  # They are measured with their losers, even if training reads winners only.
        logger.info(f"{len(eval_pairs.rows)} pairs are held out, {len(train_pairs.rows)} trained on")
        return train_pairs, eval_pairs


def load_encoding(args):
    """The encoding.json of `--encoded_data_dir`, `{}` without that flag."""
    if args.encoded_data_dir is None:
        return {}
    path = Path(args.encoded_data_dir, "encoding.json")
    if not path.is_file():
        raise InputError(f"--encoded_data_dir {path.parent} has no {path.name} of tools/encode_preferences.py.")
    return json.loads(path.read_text(encoding="utf-8"))


class EncodedPairs(PreferencePairs):
    """The same pairs from `--encoded_data_dir`, with latents in place of pixels. A pair's `tensors` are safetensors of
    shape `(2, orientations, ...)`: winner and loser, unflipped and flipped. A prompt's are its text embeddings."""

    def __init__(self, args, vae_config, latent_shape, timesteps, winner_only):
        folder, encoding = Path(args.encoded_data_dir), load_encoding(args)
        settings = {**vars(args), "vae_scaling_factor": vae_config["scaling_factor"]}
        for name in (*ENCODING_ARGUMENTS, *ENCODING_HINTS):
            if settings[name] != encoding.get(name):
                message = f"--{name} is {settings[name]!r}, but {folder} was encoded with {encoding.get(name)!r}."
                if name in ENCODING_ARGUMENTS:
                    raise InputError(message)
                logger.warning(message)
        if encoding["no_hflip"] and not args.no_hflip:
            raise InputError(f"{folder} has no flipped images: train with --no_hflip, as it was encoded.")
        if "models" not in encoding:
            logger.warning(f"{folder} does not say which files it is made of: replaced or repeated ones go unnoticed.")
        elif all(settings[name] == encoding.get(name) for name in MODEL_ARGUMENTS):
            if changed := dict(encoding["models"].items() - digest_models(args).items()):
                what = f"{args.pretrained_model_name_or_path}: {', '.join(sorted(changed))}"
                raise InputError(f"--pretrained_model_name_or_path {what} changed since {folder} was encoded.")
        stored = {}
        for part in ("pairs", "prompts"):
            paths, count = sorted(map(str, (folder / part).glob("*.arrow"))), encoding[f"num_{part}_shards"]
            if len(paths) != count:
                raise InputError(f"{folder / part} holds {len(paths)} of {count} files: encode again to add them.")
            try:
                stored[part] = datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths])
            except pa.ArrowException as error:
                raise InputError(f"{folder / part} cannot be read: {one_line(error)}") from error
        pairs = stored["pairs"].select(range(len(stored["pairs"]))[: args.max_train_samples])
        super().__init__(pairs, pairs["row"][:], args, latent_shape, timesteps, winner_only)
        self.places = {row: place for place, row in enumerate(self.rows)}
        self.prompts, self.images = stored["prompts"], encoding.get("images")
        self.source = encoding["dataset_name"] or encoding["train_data_dir"]

    def read(self, row_number, crop_position, flip):
        row = self.dataset[self.places[row_number]]
        tensors, sides = safetensors.torch.load(row["tensors"]), range(1 if self.winner_only else 2)
        images = [{name: value[side, int(flip)] for name, value in tensors.items()} for side in sides]
        prompt = safetensors.torch.load(self.prompts[row["prompt"]]["tensors"])
        return {"images": images, "prompt": prompt}, row.get("winner_probability")

    def columns(self):
        pairs = self.dataset.select([self.places[row] for row in self.rows])
        is_older = "winner_probability" not in pairs.column_names
        return pairs["label"][:], pairs["caption"][:], [None] if is_older else pairs["winner_probability"][:]

    def digests(self):
        has_digests = "digest_0" in self.dataset.column_names
        return zip(self.dataset["digest_0"][:], self.dataset["digest_1"][:]) if has_digests else [()] * len(self.rows)


def open_pairs(args, vae_config, timesteps, winner_only):
    """The pairs to train on, and the held-out pairs or `None`. The first batch is read to find mistakes."""
    latent_shape = vae_config["latent_channels"], *[args.resolution // vae_config["downscaling_factor"]] * 2
    if args.encoded_data_dir is not None:
        pairs = EncodedPairs(args, vae_config, latent_shape, timesteps, winner_only)
    else:
        dataset = load_dataset(args)
        rows = find_rows(args, dataset)
        if (folder := args.train_data_dir) is not None and args.on_bad_sample == "error":
            for column in (args.image_0_column, args.image_1_column):
                for row, image in zip(rows, dataset.select(rows)[column][:]):
                    if image and not os.path.isfile(os.path.join(folder, name := image["path"])):
                        raise InputError(f"Row {row}: {column} is {name!r:.100}, which is no file in {folder}.")
        pairs = PreferencePairs(dataset, rows, args, latent_shape, timesteps, winner_only)
        pairs.images = digest_images(args, dataset)
    pairs, eval_pairs = (pairs, None) if args.num_eval_pairs is None else pairs.hold_out(args.num_eval_pairs)
    for key in pair_stream(pairs.rows, args.seed, 0, min(args.train_batch_size, len(pairs.rows))):
        pairs[key]
    return pairs, eval_pairs


def collate_fn(examples):
    """Stacks B pairs to `(B, ...)`, but their images to `(2B, ...)`, winners first, unless there are no losers."""
    skipped = [reason for example in examples for reason in example.pop("skipped")]
    images = itertools.chain(*zip(*[example.pop("images") for example in examples]))  # winners, then losers
    return {"skipped": skipped, **default_collate(list(images)), **default_collate(examples)}


def ignore_stop_signals(worker):
    # Terminals, Slurm and launchers signal the whole process group. The trainer needs workers to finish its batch.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def create_dataloader(args, pairs, start, stop):
    """Batches (`collate_fn`) of the pairs number `start` to `stop - 1` of the stream, for all processes together."""

    @atexit.register
    def end_workers():
        # After an error workers still run. They ignore the SIGTERM of Python, which would wait for them for ever.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report an error for each of them.
        for worker in torch.multiprocessing.active_children():
            worker.kill()

    options = {"sampler": list(pair_stream(pairs.rows, args.seed, start, stop)), "collate_fn": collate_fn}
    options |= {"pin_memory": torch.accelerator.is_available(), "worker_init_fn": ignore_stop_signals}
    return DataLoader(pairs, args.train_batch_size, num_workers=args.dataloader_num_workers, **options)


def same_prompt_key(caption):
    """A text that is equal for captions that differ only in spaces, case and Unicode's ways of writing a character."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def digest_of_pairs(rows, labels, captions, probabilities, images):
    """What a resumed run knows its data by, encoded or not, from `columns_of` the pairs and `digest_images`."""
    parts = {"digest": [rows, labels, captions], **({} if None in probabilities else {"probabilities": probabilities})}
    digests = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}
    return {**digests, "num_pairs": len(rows), **({} if images is None else {"images": images})}


def digest_pair(args, row):
    """The SHA-256 of a row's first and second image, `None` for one that cannot be read."""
    digests = [None, None]
    for side, column in enumerate((args.image_0_column, args.image_1_column)):
        with contextlib.suppress(OSError, ValueError):
            digests[side] = hashlib.sha256(image_bytes(args, row[column])).hexdigest()
    return tuple(digests)


def digest_images(args, dataset):
    """A digest of a dataset's files and images, or of their addresses on the hub, which name a commit, or `None`."""
    folder, files = args.train_data_dir or args.dataset_name, list(dataset.info.download_checksums or [])
    if not os.path.isdir(folder):
        return hashlib.sha256(repr(files).encode()).hexdigest() if files else None
    for column in (args.image_0_column, args.image_1_column):
        bytes_of_images, paths = dataset.data.column(column).flatten()
        files += [os.path.join(folder, path) for path in paths.filter(bytes_of_images.is_null()).to_pylist() if path]
    return digest_files(files)


def digest_models(args):
    """Digests of the base model's parts, by name, and of the LoRA to start from."""
    name, revision, variant = args.pretrained_model_name_or_path, args.revision, args.variant
    digests = {part: digest_part(name, part, revision, variant) for part in MODEL_PARTS}
    if (own_vae := args.pretrained_vae_model_name_or_path) is not None:
        digests["vae"] = digest_part(own_vae)
    if (lora := args.pretrained_lora_path) is not None:
        digests["lora"] = digest_part(lora, "pytorch_lora_weights.safetensors")
    return digests


def digest_part(name, place="", revision=None, variant=None):
    """A digest of the file `name`, or of what is loaded from `place` in that folder. Of a hub id the commit."""
    if not os.path.exists(name):
        commit = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", revision or "main")
        return commit.read_text() if commit.is_file() else revision
    path = Path(name) if os.path.isfile(name) else Path(name, place)
    loaded = rf"[^.]+(\.{variant}[^.]*)?\.(json|txt|safetensors|bin)"
    return digest_files([path, *(file for file in sorted(path.glob("*.*")) if re.fullmatch(loaded, file.name))])


def digest_files(paths):
    """A digest of what files hold. The user's cache keeps it as long as their paths, sizes and times are the same."""
    stats = [(str(path), os.stat(path)) for path in paths if os.path.isfile(path)]
    state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    kept = Path(datasets.config.HF_CACHE_HOME, "digests", hashlib.sha256(repr(state).encode()).hexdigest())
    if os.access(kept, os.R_OK) and (known := kept.read_text()):
        return known
    digest = hashlib.sha256()
    for path, *_ in state:
        with open(path, "rb") as file:
            digest.update(sha_fileobj(file))
    with contextlib.suppress(OSError):  # Not every cache can be written.
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(digest.hexdigest())
    return digest.hexdigest()


def find_fault(*names):
    """What is wrong with the first broken .safetensors file at these paths or in these folders, or `None`."""
    for name in filter(None, names):
        for path in [Path(name), *sorted(Path(name).rglob("*.safetensors"))]:
            try:
                if path.suffix == ".safetensors" and path.is_file():
                    safetensors.safe_open(path, "pt")
            except safetensors.SafetensorError as error:
                return f"{path} is empty, cut off or a pointer of Git LFS (run `git lfs pull`): {error}"
