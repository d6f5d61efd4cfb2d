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

"""Trains a LoRA for Stable Diffusion 1.x or 2.x on preference pairs, by DPO, CPO, SFT and others, in the feature space
of the frozen U-Net's encoder (Noise-Conditioned Perception, arXiv:2406.17636) or in latent space.

    accelerate launch train_ncp_dpo_sd15.py \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name kashif/pickascore \
      --dataset_split_name validation --mixed_precision bf16 --rank 64 --gradient_checkpointing \
      --dataloader_num_workers 4 --learning_rate 1e-5 --max_train_steps 1000 --output_dir ncp-dpo-sd15

The U-Net with its LoRA is the policy; the same U-Net with the LoRA switched off is both the reference model and the
perceptual encoder. What a pair sees (timestep, noise, flip, crop) depends on the seed, the epoch and its row alone.
"""

import argparse
import atexit
import bisect
import collections
import copy
import datetime
import errno
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import datasets
import ncp_loss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast_object_list, gather_object, send_to_device
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from tqdm.auto import tqdm

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import (
    check_min_version,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
    make_image_grid,
)
from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH, populate_model_card


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.42.0")

logger = get_logger(__name__)

PIPELINE_CLASS = StableDiffusionPipeline
# Without what would paint over pictures.
PIPELINE_OPTIONS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
TEXT_ENCODERS = ["text_encoder"]
DEFAULTS = {"output_dir": "ncp-dpo-sd15-lora", "tracker_name": "ncp-dpo-sd15-lora", "resolution": 512}
ADDITION_EMBED_TYPE = None  # what a U-Net adds to its time embedding tells SDXL's from the others'
VAE_OVERFLOWS = False  # whether the base models' own VAE does in fp16, and so runs in fp32
BETAS = {}  # where another beta than that of the loss itself is to be tried first

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS_NAME = "pytorch_lora_weights_kohya.safetensors"
KOHYA_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}  # by the width of text embeddings
STATE_NAME = "training_state.json"
# The flags of a pair's columns, what these hold, and the Arrow types that may.
COLUMNS = {
    "image_0_column": ("images, encoded", "binary|string|struct"),
    "image_1_column": ("images, encoded", "binary|string|struct"),
    "label_column": ("numbers", "u?int|halffloat|float|double|decimal"),
    "caption_column": ("text", "string"),
    "preference_probability_column": ("numbers", "u?int|halffloat|float|double|decimal"),
}
# What a resumed run must have in common with its checkpoint, beside the data.
LEARNING_ARGUMENTS = """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path pretrained_lora_path revision variant
    image_0_column image_1_column label_column preference_probability_column num_eval_pairs mixed_precision
    resolution random_crop no_hflip image_interpolation_mode min_timestep max_timestep timesteps timestep_weighting
    loss_type loss_space beta_dpo sft_weight label_smoothing target_margin sdpo_safeguard rank lora_alpha seed
    ncp_layer ncp_timestep ncp_probe_rms ncp_error_scale train_batch_size gradient_accumulation_steps
    learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power
    use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
""".split()
EVAL_METRICS = ("loss", "implicit_accuracy", "margin", "error_w", "error_l", "drift_w", "drift_l")
CARD_ARGUMENTS = ("max_train_steps", "learning_rate", "rank", "resolution", "mixed_precision", "seed")
# What the unit of errors and their weights are measured for.
UNIT_ARGUMENTS = "loss_space ncp_layer ncp_timestep ncp_probe_rms min_timestep max_timestep timesteps".split()
# Pairs at least and at most, and the standard error of the scale's logarithm that is enough.
MIN_UNIT_PAIRS, MAX_UNIT_PAIRS, UNIT_ERROR = 64, 512, 0.1
# What encoded data must have been encoded with, and what it had better.
ENCODING_ARGUMENTS = ("resolution", "image_interpolation_mode", "vae_scaling_factor", *COLUMNS)
ENCODING_HINTS = "pretrained_model_name_or_path pretrained_vae_model_name_or_path mixed_precision".split()
# Less the one whose steps there is no flag for.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]


# Arguments


def number(kind, rule, accepts):
    """An argument type: an `int` or `float` that `accepts`, which `rule` says in words."""

    def convert(text):
        if not accepts(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text}, but must be {rule}")
        return value

    convert.__name__ = kind.__name__
    return convert


COUNT = number(int, "at least 1", lambda value: value >= 1)
POSITIVE = number(float, "greater than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = number(float, "at least 0", lambda value: 0 <= value < math.inf)
SHARE = number(float, "in [0, 0.5)", lambda value: 0 <= value < 0.5)
TIMESTEP = number(int, "at least 0", lambda value: value >= 0)
SEED = number(int, "within 0 and 2**32 - 1", lambda value: 0 <= value < 2**32)


def add_shared_arguments(parser):
    """The arguments that tools share with training: what is trained, and on what."""
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base model.")
    add("--pretrained_vae_model_name_or_path", help="Hub id or folder of a VAE in place of the base model's.")
    add("--revision", help="Revision of the base model on the hub.")
    add("--variant", help="Variant of the model files, e.g. fp16.")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="Hub id, or local folder of parquet files, of preference pairs.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split_name", default="train", help="Split of the dataset.")
    add("--train_data_dir", help="Folder of images with a metadata.jsonl that gives jpg_0_file_name and so on.")
    add("--image_0_column", default="jpg_0", help="Column of the first image, bytes or image.")
    add("--image_1_column", default="jpg_1", help="Column of the second image.")
    add("--label_column", default="label_0", help="Column of 1 or 0, whether the first image won, or 0.5, a tie.")
    add("--caption_column", default="caption", help="Column of the prompt.")
    add("--preference_probability_column", help="Column of how likely the first image is to win, 0 to 1.")
    add("--max_train_samples", type=COUNT, help="Use the first so many pairs with a winner only.")
    add("--on_bad_sample", choices=["error", "skip"], default="error", help="What is done about unreadable pairs.")
    add("--cache_dir", help="Where downloaded datasets are stored.")
    add("--resolution", type=COUNT, help="Side of the square that images are cropped to.")
    add("--no_hflip", action="store_true", help="Do not flip half of the pairs horizontally.")
    modes = [mode.name.lower() for mode in Image.Resampling]
    add("--image_interpolation_mode", choices=modes, default="lanczos", help="How images are resized.")
    add("--vae_encode_batch_size", type=COUNT, default=4, help="Images or captions to encode at once.")


def create_parser():
    def auto_or_positive(text):
        return text if text == "auto" else POSITIVE(text)

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add_shared_arguments(parser)
    add = parser.add_argument_group("policy").add_argument
    add("--pretrained_lora_path", help="LoRA to merge into the U-Net first: policy and reference start from it.")
    add("--rank", type=COUNT, default=4, help="Rank of the LoRA. The paper uses 64.")
    add("--lora_alpha", type=COUNT, help="Scale of the LoRA times its rank. Default: the rank.")
    add("--no_kohya", action="store_true", help="Do not write the LoRA for ComfyUI, AUTOMATIC1111 and Forge as well.")

    add = parser.add_argument_group("training data").add_argument
    add("--encoded_data_dir", help="What tools/encode_preferences.py wrote, instead of a dataset or folder of images.")
    add("--num_eval_pairs", type=COUNT, help="Pairs to hold out, by prompt, and to measure every --validation_steps.")
    add("--random_crop", action="store_true", help="Crop at random instead of the centre.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that load images; 0 is the main one.")

    add = parser.add_argument_group("loss").add_argument
    add("--loss_type", choices=ncp_loss.LOSSES, default="dpo", help="What is minimised.")
    add("--loss_space", choices=["ncp", "latent"], default="ncp", help="Where errors are measured.")
    betas = [f"{name} {BETAS.get(name, loss.beta):g}" for name, loss in ncp_loss.LOSSES.items() if loss.beta != 5000]
    beta = f"Beta. In most losses, the larger the closer to the reference. Default: 5000, {', '.join(betas)}."
    add("--beta_dpo", type=POSITIVE, help=beta)
    add("--sft_weight", type=NOT_NEGATIVE, help="Weight of the winner's error on top. Default: 1 in cpo, else 0.")
    add("--label_smoothing", type=SHARE, default=0.0, help="Share of labels taken to be wrong (dpo and cpo).")
    add("--target_margin", type=NOT_NEGATIVE, default=1.0, help="What logits are to exceed (simpo).")
    add("--sdpo_safeguard", action="store_true", help="Weaken losers' gradients that would raise winners' errors.")
    add("--min_timestep", type=TIMESTEP, default=0, help="First timestep to train on.")
    add("--max_timestep", type=TIMESTEP, help="Last timestep to train on. Default: the noise scheduler's.")
    add("--timesteps", type=TIMESTEP, nargs="+", help="Those to train on, such as a few-step model's 249 499 749 999.")
    weighting = "Weights of timesteps. balanced: margins spread alike at all; ncp, for latent errors: as in NCP."
    add("--timestep_weighting", choices=ncp_loss.TIMESTEP_WEIGHTINGS, default="none", help=weighting)
    add("--ncp_layer", choices=ncp_loss.LAYERS, default="mid", help="Block whose features count.")
    add("--ncp_timestep", choices=ncp_loss.TARGET_TIMESTEPS, default="previous", help="Timestep that features see.")
    add("--ncp_probe_rms", type=NOT_NEGATIVE, help="Size that steps are enlarged to; 0: not. Default: by precision.")
    scale = "Unit of perceptual errors. auto: measured, to give all else its meaning in latent space; 1: the paper's."
    add("--ncp_error_scale", type=auto_or_positive, default="auto", help=scale)

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", help="Where everything is written.")
    add("--seed", type=SEED, help="Default: a random one, which is printed.")
    add("--train_batch_size", type=COUNT, default=4, help="Pairs per process and batch.")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="Batches per optimization step.")
    add("--num_train_epochs", type=COUNT, default=1, help="Ignored if --max_train_steps is given.")
    add("--max_train_steps", type=COUNT, help="Optimization steps in total.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, more time.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Of all but the LoRA. Default: accelerate's config.")
    add("--compile", action="store_true", help="Compile the U-Net's transformer blocks; the first steps take minutes.")
    add("--channels_last", action="store_true", help="Keep the U-Net's convolutions in the channels-last format.")
    add("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs use TF32 in fp32.")
    add("--learning_rate", type=NOT_NEGATIVE, default=5e-4)
    add("--scale_lr", action="store_true", help="Multiply the learning rate by the pairs of a step.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant")
    add("--lr_warmup_steps", type=int, default=500, help="For schedules with a warm-up.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--local_rank", type=int, default=-1, help="Set by the launcher.")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpointing_steps", type=COUNT, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=COUNT, help="Checkpoints to keep.")
    add("--resume_from_checkpoint", help="A checkpoint's folder, its name in --output_dir, or latest.")
    add("--allow_resume_changes", action="store_true", help="Resume although settings differ from the checkpoint's.")
    add("--max_skipped_steps", type=int, default=0, help="Steps in a row that may be skipped if not finite.")

    add = parser.add_argument_group("reports").add_argument
    add("--report_to", choices=["none", *map(str, LoggerType)], default="tensorboard")
    add("--tracker_name", help="Name of the project in the tracker.")
    add("--logging_dir", default="logs", help="Folder within --output_dir for the tracker.")
    add("--run_validation", action="store_true", help="Draw images before, while and after training.")
    add("--validation_prompt", help="What to draw.")
    add("--num_validation_images", type=COUNT, default=4)
    add("--validation_steps", type=COUNT, default=200, help="Steps between validations.")
    add("--push_to_hub", action="store_true", help="Upload the LoRA, its card, pictures and logs.")
    add("--hub_token", help="Default: that of `hf auth login`.")
    add("--hub_model_id", help="Default: the name of --output_dir.")
    add("--hub_private_repo", action="store_true", help="Create the repository as a private one.")

    parser.set_defaults(**DEFAULTS)
    return parser


def check_arguments(args):
    """Raises a `ValueError` that names the flags which do not go together."""
    if [args.dataset_name, args.train_data_dir, args.encoded_data_dir].count(None) != 2:
        raise ValueError("Give exactly one of --dataset_name, --train_data_dir and --encoded_data_dir.")
    if args.encoded_data_dir is not None and args.random_crop:
        raise ValueError("--encoded_data_dir holds one crop of every image: --random_crop does not go with it.")
    if args.timesteps is not None and (args.min_timestep, args.max_timestep) != (0, None):
        raise ValueError("--timesteps are all that is trained on: --min_timestep and --max_timestep do not apply.")
    if args.label_smoothing and not ncp_loss.LOSSES[args.loss_type].has_label_smoothing:
        raise ValueError(f"--label_smoothing goes with --loss_type dpo or cpo, not {args.loss_type}.")
    if args.sft_weight is not None and args.loss_type == "sft":
        raise ValueError("--sft_weight does not go with --loss_type sft, which is the winner's error alone.")
    if args.sdpo_safeguard and args.loss_type == "sft":
        raise ValueError("--sdpo_safeguard does not go with --loss_type sft, which has no loser.")
    if args.timestep_weighting == "ncp" and args.loss_space == "ncp":
        raise ValueError("--timestep_weighting ncp is for --loss_space latent: errors in ncp space have that profile.")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; bf16 does without.")
    if args.run_validation and args.validation_prompt is None:
        raise ValueError("--run_validation needs a --validation_prompt.")
    trackers = list(map(str, get_available_trackers()))
    if args.hub_token is not None and "wandb" in (trackers if args.report_to == "all" else [args.report_to]):
        raise ValueError("--hub_token would show up in wandb's logs. Use `hf auth login` instead.")
    if args.report_to not in ("none", "all", *trackers):
        raise ImportError(f"To report to {args.report_to}, please install it: `pip install {args.report_to}`.")


def parse_args(input_args=None):
    args = create_parser().parse_args(input_args)
    check_arguments(args)
    if args.beta_dpo is None:
        args.beta_dpo = BETAS.get(args.loss_type, ncp_loss.LOSSES[args.loss_type].beta)
    if args.sft_weight is None:
        args.sft_weight = ncp_loss.LOSSES[args.loss_type].sft_weight
    return args


# Pairs: from a dataset's row to images


def load_dataset(args):
    """Opens `--dataset_name` or `--train_data_dir`, for training and all tools: images as `{"bytes", "path"}`, label
    and caption, either of which may be `None`. A `ValueError` names the flag, column, file or line that is wrong."""
    if args.train_data_dir is not None:
        return load_image_folder(args)
    name, features, file, options = args.dataset_name, pair_features(args), "", {}
    source = {"path": name, "name": args.dataset_config_name, "cache_dir": args.cache_dir}
    try:
        if Path(name).is_file():
            raise ValueError("it is a file: give the folder that it is in")
        if Path(name, "state.json").is_file():
            raise ValueError("it was written by save_to_disk: write it by to_parquet instead")
        splits, split = datasets.load_dataset_builder(**source).config.data_files or {}, args.dataset_split_name
        wanted = list(splits) if split == "all" else re.findall(r"[A-Za-z_]\w*(?:\.\w+)*", split)
        if splits and not set(wanted) <= splits.keys():
            raise ValueError(f"its splits (--dataset_split_name) are {', '.join(map(str, splits))}, not {split}")
        files = [file for name in wanted for file in splits.get(name, [])]
        if files and all(file.endswith(".parquet") for file in files):
            for file in (file for file in files if "://" not in file):
                check_columns(args, pq.read_schema(file))
            # Given here, the types of all files are these, and no other column is read.
            file, options = "", {"features": features, "columns": list(features)}
        dataset = datasets.load_dataset(**source, split=split, **options)
        check_columns(args, dataset.features.arrow_schema)
        dataset = dataset.select_columns(list(features))
        # A cast writes all of it again.
        return dataset if dataset.features == features else dataset.cast(features)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, pa.ArrowException) as error:
        what = f"{file} {one_line(error.__cause__ or error)}".strip()
        raise ValueError(f"--dataset_name {name} cannot be read: {what}") from error


def pair_columns(args):
    """The dataset's columns by their flags."""
    return {flag: getattr(args, flag) for flag in COLUMNS if getattr(args, flag) is not None}


def pair_features(args):
    number, image = datasets.Value("float64"), datasets.Image(decode=False)
    types = {"images, encoded": image, "numbers": number, "text": datasets.Value("string")}
    return datasets.Features({column: types[COLUMNS[flag][0]] for flag, column in pair_columns(args).items()})


def one_line(text, length=200):
    """A text of somebody else's, cut for a message."""
    return " ".join(str(text).split())[:length]


def check_columns(args, schema):
    """A `ValueError` if one of the columns is not there or of a type that cannot be what it should."""
    for flag, column in pair_columns(args).items():
        wanted, types = COLUMNS[flag]
        if column not in schema.names:
            raise ValueError(f"has no column {column!r} (--{flag}): there are {one_line(', '.join(schema.names))}")
        if not re.match(f"null|(large_)?({types})", kind := one_line(schema.field(column).type)):
            raise ValueError(f"column {column} (--{flag}) is of type {kind}, but must be {wanted}")


def load_image_folder(args):
    """The same of a folder with a metadata.jsonl, read line by line: no type is guessed from the lines before."""
    path, features = Path(args.train_data_dir, "metadata.jsonl"), pair_features(args)
    if not path.is_file():
        raise ValueError(f"--train_data_dir: there is no file {path}.")
    columns = {column: [] for column in features}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
            for column, feature in features.items():
                is_image = isinstance(feature, datasets.Image)
                key, kind = (f"{column}_file_name", pa.string()) if is_image else (column, feature.pa_type)
                if key not in row:
                    raise ValueError(f"has no {key!r}, but {', '.join(row)}")
                # Fails for whatever is neither null nor a number or a text, lone surrogates among them.
                pa.scalar(row[key], kind)
                columns[column].append(row[key])
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{path}, line {number}: {one_line(error)}") from error
    return datasets.Dataset.from_dict(columns, features=features)


def find_rows(args, dataset):
    """The numbers of the rows with a winner; a `ValueError` that names the first row that cannot be trained on."""
    names = args.label_column, args.caption_column, args.preference_probability_column
    try:
        columns = [dataset.data.column(name).to_pylist() for name in names if name is not None]
    except UnicodeDecodeError as error:
        raise ValueError(f"--caption_column {args.caption_column} holds what is not UTF-8: {error}") from error
    for row, values in enumerate(zip(*columns)):
        if problem := find_problem(*values):
            raise ValueError(f"Row {row}: {problem}.")
    labels = columns[0]
    rows = [row for row, label in enumerate(labels) if label != 0.5]
    logger.info(f"{len(rows)} pairs with a winner; {len(labels) - len(rows)} ties are left out")
    if not rows:
        raise ValueError(f"No pair is left: all {len(labels)} rows of the dataset are ties.")
    return rows[: args.max_train_samples]


def find_problem(label=1, caption="", probability=1):
    """What is wrong with a row's label, caption or preference probability, or `None`."""
    if label not in (0, 0.5, 1):
        return f"the label is {label}, but must be 1, 0, or 0.5 for a tie"
    if not isinstance(caption, str):
        return "the caption is null, but must be a text"
    if probability is None or not 0 <= probability <= 1:
        return f"the preference probability is {probability}, but must be from 0 to 1"


def digest_of_pairs(rows, labels, captions):
    """What a resumed run recognises its data by, as images or encoded."""
    digest = hashlib.sha256(json.dumps([rows, labels, captions]).encode())
    return {"num_pairs": len(rows), "digest": digest.hexdigest()}


def winner_probability(args, values):
    """How sure the winner of a row is, from `--preference_probability_column`, which tells of the first image."""
    probability = values[args.preference_probability_column]
    return probability if values[args.label_column] == 1 else 1 - probability


class EpochSampler(torch.utils.data.Sampler):
    """Every row once per epoch, as `(epoch, row)`, from `start` on, in an order by the seed and the epoch alone."""

    def __init__(self, rows, seed):
        self.rows, self.seed = rows, seed
        # Not by `set_epoch`, which some versions of accelerate call with numbers of their own.
        self.epoch, self.start = 0, 0

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        for index in np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows))[self.start :]:
            yield self.epoch, self.rows[index]


class UnreadableImage(ValueError):
    """Names the row, its caption, the column and what is wrong with the image."""


class PreferencePairs(torch.utils.data.Dataset):
    """`pairs[epoch, row]` for `rows`, ascending, as training sees them, at one of `timesteps`; `latent_shape`, of an
    image's latents, is `(C, H, W)`."""

    def __init__(self, dataset, rows, args, latent_shape, timesteps):
        self.dataset, self.rows, self.args = dataset, rows, args
        self.latent_shape, self.timesteps, self.fixed_timesteps = latent_shape, timesteps, None
        self.winner_only = args.loss_type == "sft" and args.preference_probability_column is None

    def __getitem__(self, key):
        # Randomness belongs to the pair, so that neither processes nor workers nor a resume can change it.
        seed = np.random.SeedSequence([self.args.seed, *key]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        crop_position = torch.rand(2, generator=generator).tolist() if self.args.random_crop else (0.5, 0.5)
        flip = bool(torch.rand((), generator=generator) < 0.5) and not self.args.no_hflip
        timesteps = self.timesteps[torch.randint(len(self.timesteps), (), generator=generator)]
        first, skipped = bisect.bisect_left(self.rows, key[1]), []
        if self.fixed_timesteps is not None:
            timesteps = self.fixed_timesteps[first]
        noise, variance_noise = torch.randn(2, *self.latent_shape, generator=generator)
        drawn = {"timesteps": timesteps, "noise": noise, "variance_noise": variance_noise}
        for index in range(first, first + len(self.rows)):
            row = self.rows[index % len(self.rows)]
            try:
                return {**self.read(row, crop_position, flip), **drawn, "rows": torch.tensor(row), "skipped": skipped}
            except UnreadableImage as error:
                skipped.append(str(error))
                if self.args.on_bad_sample == "error" or len(skipped) == len(self.rows):
                    raise

    def read(self, row, crop_position, flip):
        """The winner and, unless `winner_only`, the loser as `images`, the `caption`, and how sure the winner is."""
        values = self.dataset[row]
        images = read_images(self.args, row, values, self.winner_only)
        images = [preprocess_image(image, self.args, crop_position, flip) for image in images]
        example = {"images": images, "caption": values[self.args.caption_column]}
        if self.args.preference_probability_column is not None:
            example["winner_probability"] = torch.tensor(winner_probability(self.args, values))
        return example

    def columns(self):
        """Labels and captions, in the order of `rows`."""
        dataset = self.dataset.select(self.rows)
        return dataset[self.args.label_column][:], dataset[self.args.caption_column][:]

    def hold_out(self, num_pairs):
        """Two parts without a caption in common, of which the second has at least so many pairs."""
        captions, count = self.columns()[1], 0
        sizes, held_out = sorted(collections.Counter(captions).items()), set()
        for index in np.random.default_rng(self.args.seed).permutation(len(sizes)):
            if count < num_pairs:
                held_out.add(sizes[index][0])
                count += sizes[index][1]
        if count == len(captions):
            what = f"--num_eval_pairs {num_pairs} leaves none to train on"
            raise ValueError(f"{what}: there are {count} pairs of {len(sizes)} captions.")
        train_pairs, eval_pairs = copy.copy(self), copy.copy(self)
        train_pairs.rows = [row for row, caption in zip(self.rows, captions) if caption not in held_out]
        eval_pairs.rows = [row for row, caption in zip(self.rows, captions) if caption in held_out]
        # They are compared, whatever is trained, and always at the same timesteps.
        eval_pairs.winner_only = False
        eval_pairs.fixed_timesteps = ncp_loss.spread_timesteps(self.timesteps, 0, len(eval_pairs.rows), 0.5)
        return train_pairs, eval_pairs


def read_images(args, row, values, winner_only=False):
    """The winner and the loser of a row as RGB images, or an `UnreadableImage`."""
    columns = [args.image_0_column, args.image_1_column]
    if values[args.label_column] == 0:
        columns.reverse()
    images = []
    for column in columns[:1] if winner_only else columns:
        try:
            images.append(read_image(locate_image(args, values[column])))
        except Exception as error:
            where = f"Row {row} ({values[args.caption_column]!r:.80})"
            raise UnreadableImage(f"{where}: {column} cannot be read as an image: {one_line(error)}") from error
    return images


def locate_image(args, value):
    """The bytes of a dataset's `{"bytes", "path"}`, or its path if this lies in the data's folder or in the cache."""
    if value is None or value["bytes"] is value["path"] is None:
        raise ValueError("null instead of an image")
    if value["bytes"] is not None:
        return value["bytes"]
    if len(value["path"]) > 1000:
        raise ValueError(f"{value['path'][:20]!r}... is text instead of an image; base64 has to be decoded")
    # A dataset of somebody else's must not read other files.
    name = args.train_data_dir or args.dataset_name
    caches = [folder for folder in (args.cache_dir, datasets.config.HF_CACHE_HOME, HF_HUB_CACHE) if folder]
    folders = [Path(folder).resolve() for folder in ([name] if os.path.isdir(name) else caches)]
    path = folders[0] / value["path"]
    if not any(path.resolve().is_relative_to(folder) for folder in folders):
        where = "is a link that leaves" if Path(os.path.normpath(path)).is_relative_to(folders[0]) else "is not in"
        raise ValueError(f"{one_line(value['path'], 100)} {where} {folders[0]}")
    return str(path.resolve())


def read_image(value):
    """An image in RGB, upright, transparency on white, from encoded bytes or a path."""
    data = value if isinstance(value, bytes) else Path(value).read_bytes()
    if not data:
        raise ValueError("empty, 0 bytes")
    if (start := data[:20]).isascii() and start.decode().isprintable():
        raise ValueError(f"{start.decode()!r}... is text instead of an image; base64 has to be decoded")
    image = Image.open(io.BytesIO(data))
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # whatever PIL's parsers run into
        warnings.warn("The metadata of an image cannot be parsed and is ignored: it is taken to be upright.")
    if image.mode.startswith(("I", "F")):
        # Floats from 0 to 1, 32 bits that hold 8 or 16, and 16 bits, all of which PIL would clip.
        values = np.asarray(image).astype(np.float64)
        highest = 1 if image.mode == "F" else 255 if image.mode == "I" and values.max() <= 255 else 65535
        if not (values.min() >= 0 and values.max() <= highest):
            raise ValueError(f"its values are {values.min():g} to {values.max():g}, but must be from 0 to {highest}")
        image = Image.fromarray((values * (255 / highest)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(image, args, crop_position, flip):
    """A `(3, resolution, resolution)` square in uint8 and its `(top, left)`; `crop_position` in (0, 0) to (1, 1)."""
    size = [max(args.resolution, round(side * args.resolution / min(image.size))) for side in image.size]
    image = image.resize(size, Image.Resampling[args.image_interpolation_mode.upper()])
    if flip:
        image = ImageOps.mirror(image)
    top = round(crop_position[0] * (image.height - args.resolution))
    left = round(crop_position[1] * (image.width - args.resolution))
    image = image.crop((left, top, left + args.resolution, top + args.resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), (top, left)


def preprocess_image(image, args, crop_position, flip):
    return {"pixel_values": resize_and_crop(image, args, crop_position, flip)[0]}


class EncodedPairs(PreferencePairs):
    """The same from `--encoded_data_dir`. `tensors` are safetensors: of a pair, what `preprocess_image` gives of
    winner and loser, unflipped and, if at all, flipped, with latents for pixels; of a prompt, what `encode_prompt`
    gives. A `ValueError` if the data is not whole or was encoded by other settings than training's."""

    def __init__(self, args, vae_config, *drawn):
        folder, parts = Path(args.encoded_data_dir), {}
        if not (path := folder / "encoding.json").is_file():
            raise ValueError(f"--encoded_data_dir {folder} has no {path.name}: tools/encode_preferences.py writes it")
        encoding = json.loads(path.read_text(encoding="utf-8"))
        settings = {**vars(args), "vae_scaling_factor": vae_config["scaling_factor"]}
        for name in (*ENCODING_ARGUMENTS, *ENCODING_HINTS):
            if (before := encoding.get(name)) != settings[name]:
                change = f"--{name} is {settings[name]!r}, but {folder} was encoded with {before!r}."
                if name in ENCODING_ARGUMENTS:
                    raise ValueError(change)
                logger.warning(change)
        if encoding["no_hflip"] and not args.no_hflip:
            raise ValueError(f"{folder} was encoded with --no_hflip, without flipped images: train with --no_hflip.")
        for kind in ("pairs", "prompts"):
            paths, total = sorted(map(str, (folder / kind).glob("*.arrow"))), encoding[f"num_{kind}_shards"]
            if len(paths) != total:
                raise ValueError(f"{folder / kind} holds {len(paths)} of {total} files: encode again, to complete it.")
            parts[kind] = datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths])
        pairs = parts["pairs"].select(range(len(parts["pairs"]))[: args.max_train_samples])
        super().__init__(pairs, pairs["row"][:], args, *drawn)
        self.prompts, self.stored_rows = parts["prompts"], self.rows

    def read(self, row, crop_position, flip):
        values = self.dataset[bisect.bisect_left(self.stored_rows, row)]
        tensors, sides = safetensors.torch.load(values["tensors"]), range(1 if self.winner_only else 2)
        example = {
            "images": [{name: value[side, int(flip)] for name, value in tensors.items()} for side in sides],
            "prompt": safetensors.torch.load(self.prompts[values["prompt"]]["tensors"]),
        }
        if self.args.preference_probability_column is not None:
            example["winner_probability"] = torch.tensor(values["winner_probability"])
        return example

    def columns(self):
        dataset = self.dataset.select([bisect.bisect_left(self.stored_rows, row) for row in self.rows])
        return dataset["label"][:], dataset["caption"][:]


def open_pairs(args, accelerator, timesteps, vae_config):
    """The pairs to train on, of which the first batch is known to be readable, and the held-out ones or `None`."""
    side = args.resolution // vae_config["downscaling_factor"]
    drawn = (vae_config["latent_channels"], side, side), timesteps
    if args.encoded_data_dir is not None:
        pairs = EncodedPairs(args, vae_config, *drawn)
    else:
        dataset = load_dataset(args)
        pairs = PreferencePairs(dataset, find_rows(args, dataset), args, *drawn)
        if args.train_data_dir is not None and args.on_bad_sample == "error":
            for column in (args.image_0_column, args.image_1_column):
                images = dataset[column][:]
                for row in pairs.rows:
                    if images[row] and not os.path.isfile(os.path.join(args.train_data_dir, images[row]["path"])):
                        where = f"{column} is {images[row]['path']!r:.100}, which is no file in {args.train_data_dir}"
                        raise ValueError(f"Row {row}: {where}.")
    eval_pairs = None
    if args.num_eval_pairs is not None:
        pairs, eval_pairs = pairs.hold_out(args.num_eval_pairs)
        logger.info(f"{len(eval_pairs.rows)} pairs are held out, {len(pairs.rows)} trained on")
    num_pairs, batch_size = len(pairs.rows), args.train_batch_size * accelerator.num_processes
    if num_pairs < batch_size:
        batch = f"--train_batch_size {args.train_batch_size} on {accelerator.num_processes} process(es)"
        raise ValueError(f"{batch} takes {batch_size} pairs, but there are {num_pairs}.")
    if tail := num_pairs % batch_size:
        logger.info(f"{tail} of {num_pairs} pairs do not fill a batch: every epoch leaves others out")
    for key in itertools.islice(EpochSampler(pairs.rows, args.seed), args.train_batch_size):
        pairs[key]
    return pairs, eval_pairs


def collate_fn(examples):
    """Stacks pairs; what belongs to images (`pixel_values`, …) has the winners first, then the losers."""
    skipped = [reason for example in examples for reason in example.pop("skipped")]
    images = [image for images in zip(*(example.pop("images") for example in examples)) for image in images]
    return {"skipped": skipped, **default_collate(images), **default_collate(examples)}


def ignore_stop_signals(worker):
    # Ctrl-C and some schedulers signal all of the process group; workers must still serve the step in progress.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def create_dataloader(args, pairs):
    """Batches of pairs, shuffled anew every epoch; what fills no batch is left out."""

    @atexit.register
    def end_workers():
        # After an error they are still there, and SIGTERM is how Python would end them. Torch would report it.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in torch.multiprocessing.active_children():
            worker.kill()

    return torch.utils.data.DataLoader(
        pairs,
        sampler=EpochSampler(pairs.rows, args.seed),
        batch_size=args.train_batch_size,
        drop_last=True,
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.accelerator.is_available(),
    )


def remaining_batches(args, accelerator, dataloader, sampler, state):
    """Batches from `state`'s step on, which the caller counts, until `--max_train_steps`, each with the number of
    batches in its step, which an epoch's last may have fewer of. `sampler` is the one within `dataloader`."""
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    while state["global_step"] < args.max_train_steps:
        sampler.epoch, steps_done = divmod(state["global_step"], steps_per_epoch)
        first = steps_done * args.gradient_accumulation_steps
        sampler.start = first * args.train_batch_size * accelerator.num_processes
        for index, batch in enumerate(dataloader, start=first):
            position = index % args.gradient_accumulation_steps
            yield batch, min(args.gradient_accumulation_steps, len(dataloader) - index + position)
            if state["global_step"] == args.max_train_steps:
                return


# The checkpoint


def check_checkpoint(args):
    """The noise scheduler, the VAE's configuration and the timesteps to train on; before anything is read, a
    `ValueError` for what cannot be trained."""
    where = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    if Path(args.pretrained_model_name_or_path).is_file():
        convert = f"{PIPELINE_CLASS.__name__}.from_single_file(FILE).save_pretrained(FOLDER)"
        raise ValueError(f"{where} is a single file. Convert it, and give the folder: {convert}")
    unet, vae = load_config(args, "unet"), load_config(args, "vae")
    own_vae = args.pretrained_vae_model_name_or_path
    vae_where = where if own_vae is None else f"--pretrained_vae_model_name_or_path {own_vae}"
    if (vae_class := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(f"{vae_where}: its VAE is of class {vae_class}, but must be an AutoencoderKL.")
    if (kind := unet.get("addition_embed_type")) != ADDITION_EMBED_TYPE:
        script = {None: "use train_ncp_dpo_sd15.py", "text_time": "use train_ncp_dpo_sdxl.py"}
        raise ValueError(f"{where} is of another architecture: {script.get(kind, 'no script trains it')}.")
    size = sum(load_config(args, encoder)["hidden_size"] for encoder in TEXT_ENCODERS)
    if unet["cross_attention_dim"] != size:
        raise ValueError(f"{where}: the U-Net takes embeddings of {unet['cross_attention_dim']}, but is given {size}.")
    perceives = args.loss_space == "ncp" or args.timestep_weighting != "none"
    if perceives and args.ncp_layer == "mid" and unet.get("mid_block_type", "default") is None:
        raise ValueError(f"{where} has no mid block: give --ncp_layer down.")
    if unet["in_channels"] != vae["latent_channels"]:
        channels = f"the U-Net takes {unet['in_channels']} channels, the VAE gives {vae['latent_channels']}"
        raise ValueError(f"{where}: {channels}. Inpainting and similar models cannot be trained.")
    for option in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(option):
            raise ValueError(f"{vae_where}: its VAE has a {option}, which is not supported.")
    vae.setdefault("scaling_factor", 0.18215)  # what configurations from before this entry mean
    vae["downscaling_factor"] = factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if args.resolution % factor:
        raise ValueError(f"--resolution is {args.resolution}, but must be a multiple of {factor}, the VAE's factor.")
    scheduler = load_config(args, "scheduler", DDPMScheduler)
    if not {"beta_schedule", "trained_betas"} & scheduler.keys():
        raise ValueError(f"{where}: its {scheduler['_class_name']} has no betas of DDPM, as in EDM and flow matching.")
    noise_scheduler = DDPMScheduler.from_config(scheduler)
    if perceives or scheduler.get("prediction_type") not in ("epsilon", "v_prediction", "sample", None):
        ncp_loss.StepTable.from_scheduler(noise_scheduler, args.ncp_timestep)  # refuses what it cannot compute
    last = noise_scheduler.config.num_train_timesteps - 1
    end = last if args.max_timestep is None else args.max_timestep
    timesteps = sorted(set(args.timesteps or range(args.min_timestep, end + 1)))
    if not timesteps or timesteps[-1] > last:
        flags = f"--timesteps, or --min_timestep {args.min_timestep} and --max_timestep {end}"
        raise ValueError(f"{flags}, must be in this order and at most {last}, the noise scheduler's last.")
    return noise_scheduler, vae, torch.tensor(timesteps)


def load_config(args, component, config_class=UNet2DConditionModel):
    flag, source = "pretrained_model_name_or_path", {"subfolder": component, "revision": args.revision}
    if component == "vae" and args.pretrained_vae_model_name_or_path is not None:
        flag, source = "pretrained_vae_model_name_or_path", {}
    try:
        return config_class.load_config(getattr(args, flag), **source)
    except OSError as error:
        message = f"has no {component}, which {Path(__file__).name} needs: {one_line(error)}"
        raise ValueError(f"--{flag} {getattr(args, flag)} {message}") from error


def load_pipeline(args, accelerator, **components):
    """The base model with `--pretrained_lora_path` merged into its U-Net, as the pipeline that draws with it; without
    VAE and text encoders where nothing is encoded. `components` are given, or `None` for those that are not needed."""
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    dtypes, own_vae = {"default": weight_dtype}, args.pretrained_vae_model_name_or_path
    if args.encoded_data_dir is not None and not args.run_validation:
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in TEXT_ENCODERS)
        components.update(dict.fromkeys(["vae", *TEXT_ENCODERS, *tokenizers]))
    elif own_vae is None and VAE_OVERFLOWS:
        dtypes["vae"] = torch.float32
    try:
        if own_vae is not None and "vae" not in components:
            components["vae"] = AutoencoderKL.from_pretrained(own_vae, dtype=weight_dtype)
        options = {"revision": args.revision, "variant": args.variant, **PIPELINE_OPTIONS, **components}
        pipeline = PIPELINE_CLASS.from_pretrained(args.pretrained_model_name_or_path, dtype=dtypes, **options)
    except (OSError, ValueError) as error:
        name = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
        advice = "Where all weights are of one variant, such as fp16, give it as --variant"
        raise ValueError(f"{name} cannot be loaded: {one_line(error)}. {advice}.") from error
    if args.pretrained_lora_path is not None:
        merge_lora(args, pipeline)
    for name in TEXT_ENCODERS if pipeline.text_encoder is not None else []:
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        # Some tokenizers do not say how much is too much.
        limit = getattr(pipeline, name).config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device)


def merge_lora(args, pipeline):
    """Adds `--pretrained_lora_path` to the U-Net's weights; a `ValueError` if it holds others' or does not fit."""
    path, where = args.pretrained_lora_path, f"--pretrained_lora_path {args.pretrained_lora_path}"
    options = {"weight_name": WEIGHTS_NAME} if Path(path, WEIGHTS_NAME).is_file() else {}
    try:
        lora = pipeline.lora_state_dict(path, **options)[0]
        if others := [name for name in lora if not name.startswith("unet.")]:
            raise ValueError(f"it holds {others[0]}, but must be of a U-Net alone")
        pipeline.load_lora_weights(path, adapter_name="pretrained", **options)
        # Layers that the model does not have are passed over without a word.
        if (loaded := len(get_peft_model_state_dict(pipeline.unet, adapter_name="pretrained"))) != len(lora):
            raise ValueError(f"the U-Net has {loaded} of its {len(lora)} weights")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where} cannot be merged: {one_line(error)}") from error
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    logger.info(f"{where} is merged into the U-Net")


# Latents and embeddings


@torch.no_grad()
def encode_images(vae, pixel_values, batch_size):
    """Latents of images, the posterior's mode: `(N, 3, H, W)` in 0 to 255 to `(N, C, h, w)` in float32."""
    batches = (pixels.to(vae.device, vae.dtype) / 127.5 - 1 for pixels in pixel_values.split(batch_size))
    return torch.cat([vae.encode(pixels).latent_dist.mode() for pixels in batches]).float() * vae.config.scaling_factor


def tokenize(pipeline, name, captions):
    """The `input_ids` of captions, `(B, L)`, for the text encoder `name`."""
    tokenizer, text_encoder = (getattr(pipeline, part) for part in (name.replace("text_encoder", "tokenizer"), name))
    inputs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return inputs.input_ids.to(text_encoder.device)


@torch.no_grad()
def encode_prompt(pipeline, captions):
    """Text embeddings of captions: `prompt_embeds` of shape `(B, L, D)`."""
    return {"prompt_embeds": pipeline.text_encoder(tokenize(pipeline, "text_encoder", captions))[0]}


def prompt_conditioning(prompt, batch, images_per_pair):
    """`encoder_hidden_states` of shape `(N, L, D)` and `added_cond_kwargs`, which is `None` here, for N images."""
    return prompt["prompt_embeds"].repeat(images_per_pair, 1, 1), None


# Noise, errors and the loss


class Denoising(NamedTuple):
    """What the U-Net is asked for a batch of N images, named as in [`NoiseConditionedPerception.anchor`]."""

    noisy_latents: torch.Tensor  # (N, C, h, w)
    timesteps: torch.Tensor  # (N,)
    target: torch.Tensor  # (N, C, h, w)
    encoder_hidden_states: torch.Tensor  # (N, L, D)
    added_cond_kwargs: dict | None
    variance_noise: torch.Tensor  # (N, C, h, w)

    def predict(self, unet):
        inputs = self.noisy_latents, self.timesteps, self.encoder_hidden_states
        return unet(*inputs, added_cond_kwargs=self.added_cond_kwargs).sample

    @torch.no_grad()
    def predict_reference(self, unet):
        with ncp_loss.adapters_disabled(unet):
            return self.predict(unet)


def noise_batch(args, batch, pipeline, noise_scheduler):
    """Encodes a batch of pairs and adds each pair's noise at its timestep, to the winner and to the loser."""
    if args.encoded_data_dir is not None:
        latents, prompt = batch["latents"].float(), {name: value.float() for name, value in batch["prompt"].items()}
    else:
        latents = encode_images(pipeline.vae, batch["pixel_values"], args.vae_encode_batch_size)
        prompt = encode_prompt(pipeline, batch["caption"])
    images_per_pair = len(latents) // len(batch["noise"])
    encoder_hidden_states, added_cond_kwargs = prompt_conditioning(prompt, batch, images_per_pair)
    timesteps = batch["timesteps"].repeat(images_per_pair)
    noise, variance_noise = (batch[name].repeat(images_per_pair, 1, 1, 1) for name in ("noise", "variance_noise"))
    velocity = noise_scheduler.get_velocity(latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[noise_scheduler.config.prediction_type]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    return Denoising(noisy_latents, timesteps, target, encoder_hidden_states, added_cond_kwargs, variance_noise)


class Errors(NamedTuple):
    policy: torch.Tensor  # (N,), winners first
    reference: torch.Tensor | None  # (N,)
    gradients: torch.Tensor | None  # of the policy's errors with respect to its predictions, (N, C, h, w)


def measure_errors(args, denoising, unet, policy, perception, weights, needs_reference=False):
    """Errors, in latent space if `perception` is `None`, times the `weights` of their timesteps. `unet` is the policy
    as accelerate wrapped it, for averaged gradients; `policy` is the model in it, with its LoRA off the reference."""
    needs_reference = needs_reference or ncp_loss.LOSSES[args.loss_type].needs_reference
    ref_pred = denoising.predict_reference(policy) if needs_reference else None
    if perception is None:
        ref_errors = ncp_loss.latent_error(ref_pred, denoising.target) if needs_reference else None
        model_pred = denoising.predict(unet)
        errors = ncp_loss.latent_error(model_pred, denoising.target)
    else:
        anchor = perception.anchor(**denoising._asdict(), ref_pred=ref_pred)
        model_pred = denoising.predict(unet)
        errors, ref_errors = perception.error(model_pred, anchor), anchor.ref_errors
    weights, gradients = weights[denoising.timesteps], None
    if args.sdpo_safeguard and errors.requires_grad:
        (gradients,) = torch.autograd.grad(errors.sum(), model_pred, retain_graph=True)
    return Errors(errors * weights, ref_errors * weights if needs_reference else None, gradients)


def measure_loss(args, errors, batch):
    """The [`PreferenceLoss`] of a batch's pairs; of winners alone, as sft reads them, the loss without the rest."""
    if len(errors.policy) == len(batch["timesteps"]):
        return ncp_loss.PreferenceLoss(errors.policy.mean(), None, None)
    options = args.loss_type, args.beta_dpo, args.sft_weight, args.label_smoothing, args.target_margin
    probability = batch.get("winner_probability")
    return ncp_loss.preference_loss(errors.policy, errors.reference, *options, probability, errors.gradients)


def tabulate(batch, errors):
    """What is to be known of a batch's pairs later, by name, each of shape `(B,)`."""
    table = {name: batch[name] for name in ("rows", "timesteps", "winner_probability") if name in batch}
    for name, values in (("error", errors.policy), ("ref_error", errors.reference)):
        if values is not None:
            table.update(zip((f"{name}_w", f"{name}_l"), values.detach().split(len(batch["rows"]))))
    return table


def summarize(args, table):
    """Means over the pairs of a table."""
    sides = [side for side in "wl" if f"error_{side}" in table]
    has_reference = "ref_error_w" in table
    errors = torch.cat([table[f"error_{side}"] for side in sides])
    ref_errors = torch.cat([table[f"ref_error_{side}"] for side in sides]) if has_reference else None
    loss, margin, implicit_accuracy = measure_loss(args, Errors(errors, ref_errors, None), table)
    metrics = {"loss": loss, **{f"error_{side}": table[f"error_{side}"] for side in sides}}
    if margin is not None:
        metrics.update(margin=margin, implicit_accuracy=implicit_accuracy)
    if has_reference:
        # How far the policy has left the reference: what grows before a run diverges.
        metrics.update((f"drift_{side}", table[f"error_{side}"] - table[f"ref_error_{side}"]) for side in sides)
    if margin is not None and ncp_loss.LOSSES[args.loss_type].uses_logits:
        logits = 0.5 * args.beta_dpo * margin
        # About 0, where the policy is the reference, so that one pair has a spread too.
        metrics["logit_spread"] = logits.square().mean().sqrt()
        metrics["saturated"] = (logits.abs() > 5).float()
    return {name: value.mean().item() for name, value in metrics.items()}


def split_by_timestep(table, timesteps):
    """Those of four equal ranges of `timesteps` that a table has pairs of: `(name, part of the table)`."""
    for bucket in timesteps.tensor_split(4):
        within = torch.isin(table["timesteps"], bucket)
        if within.any():
            yield f"{bucket[0]}-{bucket[-1]}", {name: value[within] for name, value in table.items()}


# The unit of errors and the weights of timesteps


@torch.no_grad()
def measure_margins(args, accelerator, dataloader, policy, pipeline, noise_scheduler, perception, timesteps):
    """Timesteps, latent and perceptual margins (for sft the winners' part), each of shape `(P,)`, under a small random
    change of the policy, of as many pairs as `error_scale` needs; too few come again at other timesteps."""
    generator, measured = torch.Generator().manual_seed(args.seed), []
    offset = torch.rand((), generator=generator).item()
    weights = torch.ones(noise_scheduler.config.num_train_timesteps, device=accelerator.device)
    bar = tqdm(total=MAX_UNIT_PAIRS, desc="Error scale", disable=not accelerator.is_local_main_process)
    before = copy.deepcopy(get_peft_model_state_dict(policy))
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer):
            up = layer.lora_B["default"].weight  # scaled so that the update is 2 % of the weight
            up.copy_(torch.randn(up.shape, generator=generator))
            up *= 0.02 * layer.base_layer.weight.float().norm() / layer.get_delta_weight("default").norm()
    for index, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(dataloader))):
        size = len(batch["timesteps"])
        first = size * (index * accelerator.num_processes + accelerator.process_index)
        batch["timesteps"] = ncp_loss.spread_timesteps(timesteps, first, size, offset).to(accelerator.device)
        denoising, row = noise_batch(args, batch, pipeline, noise_scheduler), [batch["timesteps"].float()]
        for perceive in (None, perception):
            errors = measure_errors(args, denoising, policy, policy, perceive, weights, needs_reference=True)
            change = errors.reference - errors.policy
            row.append(change if len(change) == size else torch.sub(*change.chunk(2)))
        measured.append(accelerator.gather(torch.stack(row, dim=1)).cpu())
        bar.update(len(measured[-1]))
        table = torch.cat(measured)
        if len(table) < MIN_UNIT_PAIRS:
            continue
        try:
            standard_error = ncp_loss.error_scale(*table[:, 1:].T)[1]
        except ValueError as error:
            raise RuntimeError(f"Give --ncp_error_scale, it cannot be measured: {error}") from error
        bar.set_postfix(standard_error=f"{standard_error:.3f}")
        if standard_error <= UNIT_ERROR or len(table) >= MAX_UNIT_PAIRS:
            break
    bar.close()
    set_peft_model_state_dict(policy, before)
    return table[:, 0].long(), table[:, 1], table[:, 2]


def create_perception(args, accelerator, dataloader, policy, pipeline, noise_scheduler, timesteps, saved, state):
    """What errors are measured with, `None` for latent space, and the weights of all timesteps. Unit and weights are
    given, those of the checkpoint, or measured now."""
    weights = torch.ones(noise_scheduler.config.num_train_timesteps, device=accelerator.device)
    if args.loss_space == "latent" and args.timestep_weighting == "none":
        return None, weights
    options = args.ncp_layer, args.ncp_timestep, args.ncp_probe_rms
    perception, known = ncp_loss.NoiseConditionedPerception(policy, noise_scheduler, *options), ""
    scale = profiles = None
    if saved is not None and not find_changes(args, saved, UNIT_ARGUMENTS):
        scale, profiles = saved["error_scale"], saved.get("margin_profiles")
    if args.ncp_error_scale != "auto":
        scale = args.ncp_error_scale
    if args.loss_space == "ncp" and scale is None or args.timestep_weighting != "none" and profiles is None:
        # Nothing can change at the first timestep.
        inner = timesteps[timesteps > 0] if len(timesteps) > 1 else timesteps
        measured_with = policy, pipeline, noise_scheduler, perception, inner
        seen, *margins = measure_margins(args, accelerator, dataloader, *measured_with)
        profiles = [ncp_loss.margin_profile(seen, values, inner).tolist() for values in margins]
        if args.ncp_error_scale == "auto":
            measured, standard_error = ncp_loss.error_scale(*margins)
            # So few digits that the flag that is printed gives the very same run.
            scale, known = float(f"{measured:.4g}"), f" (standard error {100 * standard_error:.0f} %)"
    if profiles is not None:
        weights[timesteps] = save_timestep_weights(args, accelerator, profiles, timesteps).to(weights)
    state["margin_profiles"] = profiles
    if args.loss_space == "latent":
        return None, weights
    perception.error_scale = state["error_scale"] = scale
    logger.info(f"Perceptual errors are scaled by --ncp_error_scale {scale}{known}")
    return perception, weights


def save_timestep_weights(args, accelerator, profiles, timesteps):
    """The weights of `timesteps`, which `timesteps.csv` holds beside the size of margins in both spaces."""
    profiles = torch.tensor(profiles, dtype=torch.float64)
    weights = ncp_loss.timestep_weights(args.timestep_weighting, *profiles, args.loss_space, len(timesteps))
    columns = [timesteps, *(ncp_loss.smooth_curve(profile, len(timesteps)).exp() for profile in profiles), weights]
    if accelerator.is_main_process:
        path, head = Path(args.output_dir, "timesteps.csv"), "timestep,latent_margin,ncp_margin,weight"
        np.savetxt(path, torch.stack(columns, dim=1), "%d,%.9g,%.9g,%.9g", header=head, comments="")
    if args.timestep_weighting != "none":
        shown = [f"{t}: {weight:.2f}" for t, weight in zip(timesteps, weights)][:: math.ceil(len(timesteps) / 8)]
        logger.info(f"Errors are weighed by timestep, {', '.join(shown)}, and so on as in timesteps.csv")
    return weights


# Setup


def create_accelerator(args):
    """Sets up accelerate, logging, the output folder and, if asked for, the repository on the hub."""
    accelerator = Accelerator(
        # Hours may pass until the others have written, drawn or looked through as much.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
    )
    if (steps := accelerator.gradient_accumulation_steps) != args.gradient_accumulation_steps:
        flag = f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}"
        raise ValueError(f"{flag}, but accelerate's configuration or environment says {steps}. Give both the same.")
    args.mixed_precision = accelerator.mixed_precision
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    logger.info(accelerator.state, main_process_only=False)
    if not accelerator.is_local_main_process:
        for library in (datasets.utils, transformers.utils, diffusers.utils):
            library.logging.set_verbosity_error()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        if args.push_to_hub:
            name = args.hub_model_id or Path(args.output_dir).resolve().name
            options = {"private": args.hub_private_repo or None, "exist_ok": True, "token": args.hub_token}
            args.hub_model_id = create_repo(name, **options).repo_id
    return accelerator


def set_run_seed(args, saved):
    """If no seed is given, takes over the checkpoint's or draws one, the same on every process."""
    if args.seed is None:
        drawn = int(np.random.SeedSequence().generate_state(1)[0])
        args.seed = saved["arguments"]["seed"] if saved else broadcast_object_list([drawn])[0]
        logger.info(f"Drew --seed {args.seed}")
    torch.manual_seed(args.seed)


def create_policy(args, unet):
    """The frozen U-Net with a LoRA in float32 that does nothing yet."""
    unet.requires_grad_(False)
    options = {"r": args.rank, "lora_alpha": args.lora_alpha or args.rank, "init_lora_weights": "gaussian"}
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **options))
    cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.compile:
        # Each size of block is compiled with its adapter on and off, with and without gradients, in autocast and out.
        torch._dynamo.config.recompile_limit = 64
        # Rounded as uncompiled, they predict the same with the adapter off as with one that does nothing yet.
        unet.compile_repeated_blocks(options={"emulate_precision_casts": True})
    return unet


def create_optimizer(args, accelerator, policy):
    """AdamW over the LoRA, with 8-bit states if asked for, and the schedule of its learning rate."""
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes as bnb
        except ImportError:
            raise ImportError("To use 8-bit Adam, please install bitsandbytes: `pip install bitsandbytes`.")
        optimizer_class = bnb.optim.AdamW8bit
    pairs_per_step = args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    optimizer = optimizer_class(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=args.learning_rate * (pairs_per_step if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    if args.lr_scheduler == "constant" and args.lr_warmup_steps not in (0, 500):
        logger.warning("--lr_scheduler constant ignores --lr_warmup_steps: constant_with_warmup has a warm-up")
    elif args.lr_scheduler != "constant" and args.lr_warmup_steps >= args.max_train_steps:
        logger.warning(f"--lr_warmup_steps {args.lr_warmup_steps} are all steps: --learning_rate is never reached")
    # accelerate steps it once per process.
    steps = (number * accelerator.num_processes for number in (args.lr_warmup_steps, args.max_train_steps))
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, None, *steps, args.lr_num_cycles, args.lr_power)


def create_state(args, accelerator, pairs, num_batches):
    """What a checkpoint's training_state.json holds. Sets `--max_train_steps` if only epochs are given."""
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * math.ceil(num_batches / args.gradient_accumulation_steps)
    return {
        "global_step": 0,
        "error_scale": None,
        "margin_profiles": None,
        "num_processes": accelerator.num_processes,
        "arguments": {name: value for name, value in vars(args).items() if name != "hub_token"},
        "data": digest_of_pairs(pairs.rows, *pairs.columns()),
    }


# Checkpoints


def find_changes(args, saved, names):
    """What is not as in a checkpoint, of which those from before a flag were trained with the flag's default."""
    defaults = create_parser()
    before = {name: saved["arguments"].get(name, defaults.get_default(name)) for name in names}
    now = {name: getattr(args, name) for name in names}
    return [f"--{name} is {now[name]!r}, but was {before[name]!r}" for name in names if now[name] != before[name]]


class Checkpoints:
    """`checkpoint-N` in `--output_dir`; what has another name is not ours. `checkpoint` is what the run resumes from,
    and `saved` its state, or both are `None`."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator, self.folder = args, accelerator, Path(args.output_dir)
        # Machines need not share the folder: the main process chooses, and all others must have what it chose.
        checkpoint = self.choose() if accelerator.is_main_process else None
        choice = [checkpoint, checkpoint and self.read_state(checkpoint)]
        checkpoint, saved = self.checkpoint, self.saved = broadcast_object_list(choice)
        has_it = checkpoint is None or (checkpoint / STATE_NAME).is_file() and self.read_state(checkpoint) == saved
        if without := [rank for rank, has in enumerate(gather_object([has_it])) if not has]:
            advice = "copy it to their machines, or share --output_dir"
            raise ValueError(f"Process 0 resumes from {checkpoint}, which processes {without} have not: {advice}.")

    def find(self):
        """Complete checkpoints in ascending order of their steps."""
        folders = (path.parent for path in self.folder.glob(f"checkpoint-*/{STATE_NAME}"))
        steps = {int(folder.name[11:]): folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)}
        return [folder for _, folder in sorted(steps.items())]

    @staticmethod
    def read_state(checkpoint):
        return json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))

    def choose(self):
        """What `--resume_from_checkpoint` means; `None` for a new run."""
        checkpoints, where = self.find(), f"--output_dir {self.folder} holds"
        finished, wanted = (self.folder / WEIGHTS_NAME).is_file(), self.args.resume_from_checkpoint
        if wanted is None and (checkpoints or finished):
            advice = "Give another folder, or continue that run by --resume_from_checkpoint latest."
            raise ValueError(f"{where} {checkpoints[-1].name if checkpoints else 'the LoRA'} of another run. {advice}")
        if wanted == "latest":
            for path in set(self.folder.glob("*checkpoint-*")) - set(checkpoints):
                logger.warning(f"{path} is passed over: it is no complete checkpoint")
            if not checkpoints and finished:
                raise ValueError(f"{where} a finished LoRA and no checkpoint to resume from. Give another folder.")
            if not checkpoints:
                logger.info(f"There is no checkpoint in {self.folder} yet: starting anew")
        if wanted in (None, "latest"):
            return checkpoints[-1] if checkpoints else None
        named = [Path(wanted), self.folder / wanted]
        found = next((folder for folder in named if (folder / STATE_NAME).is_file()), None)
        if found is None:
            raise ValueError(f"--resume_from_checkpoint: there is no checkpoint {named[0]}, nor {named[1]}.")
        own = [folder.resolve() for folder in checkpoints]
        # Those after it, or all, if it is of another folder.
        others = own[own.index(found.resolve()) + 1 :] if found.resolve() in own else own
        if others or finished and not own:
            names = ", ".join(folder.name for folder in others) or "the LoRA"
            raise ValueError(f"{where} {names}, which a run from {found} would meet. Keep it elsewhere.")
        return found

    def check(self, state):
        """A `ValueError` for what would change a resumed run, whose state is `state`, without a word."""
        args, checkpoint, saved = self.args, self.checkpoint, self.saved
        if checkpoint is None:
            return
        if (processes := saved["num_processes"]) != state["num_processes"]:
            # Nor could --allow_resume_changes help: steps of the learning rate's schedule count once per process.
            advice = f"give accelerate launch --num_processes {processes}"
            raise ValueError(f"{checkpoint} is of {processes} processes, not {state['num_processes']}: {advice}.")
        if args.max_train_steps < saved["global_step"]:
            raise ValueError(f"--max_train_steps is {args.max_train_steps}, but {checkpoint} is further on.")
        # The learning rate of most schedules falls towards the last step.
        names = LEARNING_ARGUMENTS + ([] if args.lr_scheduler.startswith("constant") else ["max_train_steps"])
        if args.ncp_error_scale in ("auto", saved["error_scale"]):
            names.remove("ncp_error_scale")
        changes = find_changes(args, saved, names)
        if (data := saved.get("data", state["data"])) != state["data"]:
            changes.append(f"the data are {state['data']['num_pairs']} pairs, but were {data['num_pairs']} others")
        if changes and not args.allow_resume_changes:
            advice = "Give what it was, or --allow_resume_changes if you mean it."
            raise ValueError(f"{'; '.join(changes)} in {checkpoint}. {advice}")
        for change in changes:
            logger.warning(f"{change} in {checkpoint}")

    def load(self, policy, state):
        """Resumes, if there is a checkpoint. Of `policy`, checkpoints hold the LoRA alone, in Diffusers' format."""
        self.policy = policy
        # Or else accelerate would save and load the whole U-Net as well.
        self.accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        self.accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        if self.checkpoint is None:
            return
        self.accelerator.load_state(str(self.checkpoint))
        lora = safetensors.torch.load_file(self.checkpoint / WEIGHTS_NAME)
        lora = convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in lora.items()})
        result = set_peft_model_state_dict(policy, lora)
        if wrong := [name for name in result.missing_keys if "lora" in name] + result.unexpected_keys:
            raise ValueError(f"The LoRA in {self.checkpoint} does not fit: {wrong}.")
        state["global_step"] = self.saved["global_step"]
        logger.info(f"Resumed from {self.checkpoint}")

    def save(self, state):
        """Writes `checkpoint-N`, so named only when all of it is on the disk, and removes those over the limit."""
        folder = self.folder / f"checkpoint-{state['global_step']}"
        incomplete = folder.with_name(f"incomplete-{folder.name}")
        try:
            self.accelerator.save_state(str(incomplete))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.save_lora(incomplete)
                (incomplete / STATE_NAME).write_text(json.dumps(state, indent=2), encoding="utf-8")
                for path in incomplete.rglob("*"):
                    synchronize(path)
                incomplete.rename(folder)
            self.accelerator.wait_for_everyone()
            # What a machine that does not share --output_dir keeps of it.
            shutil.rmtree(incomplete, ignore_errors=True)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            whole = ", ".join(path.name for path in self.find()) or "none"
            advice = f"Whole checkpoints: {whole}. Make room, or go on from one of them in another --output_dir."
            raise RuntimeError(f"{folder} could not be saved: {error}. {advice}") from error
        if self.accelerator.is_main_process and self.args.checkpoints_total_limit is not None:
            for old in self.find()[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)
        logger.info(f"Saved {folder}")

    def save_lora(self, folder):
        lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.policy))
        metadata = self.policy.peft_config["default"].to_dict()
        PIPELINE_CLASS.save_lora_weights(folder, unet_lora_layers=lora, unet_lora_adapter_metadata=metadata)


def public_name(name):
    """A hub id as it is, a folder without where it lies."""
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def describe_run(state):
    """What the model card and the metadata of its files say of the run that has this `training_state.json`."""
    arguments = state["arguments"]
    source = arguments["dataset_name"] or arguments["train_data_dir"] or arguments["encoded_data_dir"]
    return {
        "ss_sd_model_name": public_name(arguments["pretrained_model_name_or_path"]),
        "ss_steps": str(state["global_step"]),
        "ncp_loss": f"{arguments['loss_type']} in {arguments['loss_space']} space",
        "ncp_error_scale": str(state["error_scale"]),
        "ncp_beta_dpo": f"{arguments['beta_dpo']:g}",
        "ncp_dataset": public_name(source),
        "ncp_pretrained_lora": public_name(arguments.get("pretrained_lora_path") or "none"),
    }


def save_kohya_lora(path, lora, alphas, description):
    """Writes a U-Net's LoRA as kohya's scripts do, for ComfyUI, AUTOMATIC1111 and Forge: `unet.mid_block.….to_out.0` is
    called `lora_unet_mid_block_…_to_out_0`, and alpha over rank is the scale of its update. `lora` is in PEFT's format,
    `unet.….lora_A.weight` of shape `(rank, in)` and so on; `alphas` are by the layers' paths, without `unet.`, by default
    the ranks; `description` are metadata beside rank, alpha and the kind of base model, which are returned."""
    kohya = convert_state_dict_to_kohya({name: value.cpu().contiguous() for name, value in lora.items()})
    alphas = {f"lora_unet_{layer.replace('.', '_')}.alpha": alpha for layer, alpha in alphas.items()}
    for name in [name for name in kohya if name.endswith(".alpha")]:
        kohya[name] = torch.tensor(float(alphas.get(name, kohya[name])))
    values = {
        "dim": {len(value) for name, value in kohya.items() if "lora_down" in name},
        "alpha": {value.item() for name, value in kohya.items() if name.endswith(".alpha")},
    }
    network = {f"ss_network_{name}": f"{min(all):g}" if len(all) == 1 else "Dynamic" for name, all in values.items()}
    widths = [value.shape[1] for name, value in kohya.items() if name.endswith("attn2_to_k.lora_down.weight")]
    # AUTOMATIC1111 takes LoRAs that do not say it for SD 1.x's, and hides those of other models.
    version = KOHYA_VERSIONS.get(max(widths, default=None), "unknown")
    network |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    metadata = {"format": "pt", "ss_network_module": "networks.lora", **network, **description}
    safetensors.torch.save_file(kohya, path, metadata)
    return metadata


def synchronize(path):
    """Waits until a file is on the disk itself, where that can be asked for."""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            # Some file systems synchronize nothing. A disk that is full or broken says something else.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise


# Reports


class Monitor:
    """Logs the metrics of every step, one step late, when the device has them, and says what goes wrong."""

    def __init__(self, args, accelerator, state, timesteps):
        self.args, self.accelerator, self.state, self.timesteps = args, accelerator, state, timesteps
        # TensorBoard refuses lists.
        settings = {**state["arguments"], "ncp_error_scale": state["error_scale"], "timesteps": str(args.timesteps)}
        accelerator.init_trackers(args.tracker_name, settings)
        logger.info(f"Training for {args.max_train_steps} steps")
        quiet = not accelerator.is_local_main_process
        self.progress_bar = tqdm(total=args.max_train_steps, initial=state["global_step"], desc="Steps", disable=quiet)
        self.num_skipped_pairs, self.skipped_steps, self.flat_steps, self.pending = 0, 0, 0, None

    @property
    def validates(self):
        """Whether held-out pairs are measured and images drawn at the step that is reached: at the first and the last, too."""
        step = self.state["global_step"]
        return step == self.args.max_train_steps or step % self.args.validation_steps == 0

    def report_skipped_pairs(self, reasons):
        for reason in reasons:
            self.num_skipped_pairs += 1
            message = f"{reason}. The next pair takes its place, {self.num_skipped_pairs} were skipped so far"
            logger.warning(message, main_process_only=False)

    def record(self, tables, grad_norm, learning_rate):
        """Gathers the tables of a step's batches from all processes, and logs the step before."""
        columns = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
        columns["grad_norm"] = grad_norm.expand(len(columns["rows"]))
        values = self.accelerator.gather(torch.stack([column.float() for column in columns.values()], dim=1))
        # The copy is made while the device goes on: to wait for it now would leave the device without work.
        values = values.to("cpu", non_blocking=True)
        copied = torch.accelerator.current_stream().record_event() if grad_norm.device.type != "cpu" else None
        self.flush()
        self.pending = self.state["global_step"], learning_rate, dict(zip(columns, values.T)), copied

    def flush(self):
        """Logs what waits; a `RuntimeError` if one step too many in a row is not finite."""
        if self.pending is None:
            return
        (step, learning_rate, table, copied), self.pending = self.pending, None
        if copied is not None:
            copied.synchronize()
        metrics = {**summarize(self.args, table), "grad_norm": table["grad_norm"][0].item(), "lr": learning_rate}
        self.check_finite(step, metrics, table["rows"].int().tolist())
        for bucket, part in split_by_timestep(table, self.timesteps):
            summary = summarize(self.args, part)
            kept = summary.keys() & {"implicit_accuracy", "margin", "drift_w", "drift_l"}
            metrics.update({f"{name}/{bucket}": summary[name] for name in kept})
        shown = sorted(metrics.keys() & {"loss", "implicit_accuracy", "margin"})
        self.progress_bar.set_postfix({name: f"{metrics[name]:.4g}" for name in shown}, refresh=False)
        self.progress_bar.update()
        self.accelerator.log(metrics, step=step)
        self.flat_steps = self.flat_steps + 1 if metrics.get("logit_spread", math.inf) < 0.01 else 0
        if self.flat_steps == 100:
            effect = f"--beta_dpo {self.args.beta_dpo} does nothing, nothing holds the policy near the reference"
            logger.warning(f"The logits' spread was below 0.01 for 100 steps: {effect}. Raise it.")

    def check_finite(self, step, metrics, rows):
        # In fp16 the gradient overflows now and then, which the loss scaler sees to, but for ever is not now and then.
        scaled = self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() >= 1
        if math.isfinite(metrics["loss"]) and (math.isfinite(metrics["grad_norm"]) or scaled):
            self.skipped_steps = 0
            return
        self.skipped_steps += 1
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, rows {rows}"
        if self.skipped_steps > self.args.max_skipped_steps:
            limit = f"--max_skipped_steps {self.args.max_skipped_steps} allows no more"
            raise RuntimeError(f"Step {step} is not finite: {what}. {limit}; checkpoints are intact.")
        logger.warning(f"Step {step} is not finite: {what}. It is skipped.")


@torch.no_grad()
def measure_held_out(args, accelerator, pairs, policy, pipeline, noise_scheduler, perception, weights, monitor):
    """Measures held-out pairs in latent space and that of training, at all timesteps and by bucket, for trackers and
    `eval.csv`, of which it replaces what is there from this step on."""
    spaces = {"latent": (None, torch.ones_like(weights)), args.loss_space: (perception, weights)}
    tables, metrics, lines, global_step = {space: [] for space in spaces}, {}, [], monitor.state["global_step"]
    with accelerator.split_between_processes(pairs.rows) as rows:
        keys = [(0, row) for row in rows]
    for batch in torch.utils.data.DataLoader(pairs, args.train_batch_size, sampler=keys, collate_fn=collate_fn):
        monitor.report_skipped_pairs(batch["skipped"])
        denoising = noise_batch(args, send_to_device(batch, weights.device), pipeline, noise_scheduler)
        for space, measured_with in spaces.items():
            errors = measure_errors(args, denoising, policy, policy, *measured_with, needs_reference=True)
            tables[space].append(send_to_device(tabulate(batch, errors), "cpu"))
    for space, parts in tables.items():
        parts = gather_object(parts)
        table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for bucket, part in [("all", table), *split_by_timestep(table, pairs.timesteps)]:
            summary = summarize(args, part)
            values = [summary[name] for name in EVAL_METRICS]
            metrics.update((f"eval/{space}/{name}/{bucket}", value) for name, value in zip(EVAL_METRICS, values))
            lines.append(",".join(map(str, [global_step, space, bucket, len(part["rows"]), *values])))
    accelerator.log(metrics, step=global_step)
    accuracy = metrics[f"eval/{args.loss_space}/implicit_accuracy/all"]
    logger.info(f"Held-out pairs at step {global_step}: implicit accuracy {accuracy:.3f}")
    if accelerator.is_main_process:
        path = Path(args.output_dir, "eval.csv")
        head = ",".join(["step", "space", "timesteps", "pairs", *EVAL_METRICS])
        earlier = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
        earlier = [line for line in earlier if int(line.split(",")[0]) < global_step]
        path.write_text("\n".join([head, *earlier, *lines, ""]), encoding="utf-8")


def launch_command(args, accelerator, name=str):
    """The command of this run, with all that is not default, less its checkpoint and secrets; paths by `name`."""
    parser, words = create_parser(), [name(sys.argv[0])]
    for flag, value in vars(args).items():
        if flag not in ("resume_from_checkpoint", "hub_token", "local_rank") and value != parser.get_default(flag):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(name(str(value)) for value in values)]
    return f"accelerate launch --num_processes {accelerator.num_processes} {shlex.join(words)}"


def finish(args, accelerator, policy, state):
    """Writes the LoRA for other programs and the model card, of what it was trained on and how, and uploads all."""
    about, output_dir = describe_run(state), Path(args.output_dir)
    if not args.no_kohya:
        lora = get_peft_model_state_dict(policy)
        alphas = {name.partition(".lora_")[0]: args.lora_alpha or args.rank for name in lora}
        lora = {f"unet.{name}": value for name, value in lora.items()}
        save_kohya_lora(output_dir / KOHYA_WEIGHTS_NAME, lora, alphas, about)

    def table(head, *rows):
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))

    settings = {name.removeprefix("ncp_"): value for name, value in about.items() if name.startswith("ncp_")}
    settings["pairs per step"] = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    settings.update((name, getattr(args, name)) for name in CARD_ARGUMENTS)
    held_out = ""
    if args.num_eval_pairs is not None:
        head, *rows = [line.split(",") for line in (output_dir / "eval.csv").read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row[1:3] == [args.loss_space, "all"]]
        held_out = f"On held-out pairs:\n\n{table(head, *rows)}"
    base_model = public_name(args.pretrained_model_name_or_path)
    repo_id = args.hub_model_id or output_dir.resolve().name
    on_hub = None if os.path.exists(args.pretrained_model_name_or_path) else base_model
    tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "ncp-dpo"]
    description = f"""# {repo_id}

A LoRA for `{base_model}`, trained on the preference pairs of `{about["ncp_dataset"]}` with
[Noise-Conditioned Perception](https://huggingface.co/papers/2406.17636).

{f"![{args.validation_prompt}, before and after](validation/before_after.png)" if args.run_validation else ""}

{table(("setting", "value"), *settings.items())}

{held_out}

`DiffusionPipeline.from_pretrained("{base_model}").load_lora_weights("{repo_id}")` loads it.

    {launch_command(args, accelerator, public_name)}

trains it.
"""
    data = ModelCardData(library_name="diffusers", base_model=on_hub)
    card = ModelCard.from_template(data, MODEL_CARD_TEMPLATE_PATH, model_description=description)
    populate_model_card(card, tags=tags).save(output_dir / "README.md")
    if args.push_to_hub:
        # Less the checkpoints, and whatever else lies there.
        files = [WEIGHTS_NAME, KOHYA_WEIGHTS_NAME, "README.md", "*.csv", "validation/*.png", f"{args.logging_dir}/**"]
        options = {"allow_patterns": files, "commit_message": "End of training", "token": args.hub_token}
        upload_folder(repo_id=args.hub_model_id, folder_path=args.output_dir, **options)


@torch.no_grad()
def log_validation(args, accelerator, pipeline, global_step):
    """Draws `validation/step-N.png` and, below step 0, the base model, `before_after.png`, all from the same noise."""
    folder = Path(args.output_dir, "validation")
    path, vae = folder / f"step-{global_step}.png", pipeline.vae
    if not (args.run_validation and accelerator.is_main_process) or global_step == 0 and path.is_file():
        return
    logger.info(f"Drawing {args.num_validation_images} validation images at step {global_step}")
    # Once for all images, and in both pipelines' order.
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    guided = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    embeds = pipeline.encode_prompt(args.validation_prompt, device=accelerator.device, **guided)
    options = {"height": args.resolution, "width": args.resolution, "num_inference_steps": 25, "output_type": "latent"}
    options.update(zip(names, embeds))
    images = []
    # While latents to train on come from whole images, nothing needs as much memory as to draw them so.
    vae.enable_tiling()
    for index in range(args.num_validation_images):
        generator = torch.Generator(accelerator.device).manual_seed(args.seed + index)
        latents = pipeline(generator=generator, **options).images
        # Decoded here, since pipelines decode in the dtype of the latents, in which SDXL's VAE overflows.
        image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        images += pipeline.image_processor.postprocess(image)
    vae.disable_tiling()
    folder.mkdir(exist_ok=True)
    make_image_grid(images, rows=1, cols=len(images)).save(path)
    before_after = [Image.open(folder / f"step-{step}.png") for step in (0, global_step)]
    make_image_grid(before_after, rows=2, cols=1).save(folder / "before_after.png")
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.stack(images)}, step=global_step, **options)


class StopSignals:
    """Notices the first SIGTERM and SIGINT; a second one stops at once."""

    def __init__(self):
        self.number, self.sum = 0, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def reached(self, accelerator):
        """Whether any process had received one at the step before, of which the device need not be waited for."""
        before, self.sum = self.sum, accelerator.reduce(torch.tensor(self.number, device=accelerator.device))
        return before is not None and before.item() > 0

    def stop(self, args, accelerator):
        """Ends the run, its checkpoint saved, with the command that goes on."""
        accelerator.end_training()
        number = self.number or signal.SIGTERM
        command = f"{launch_command(args, accelerator)} --resume_from_checkpoint latest"
        logger.info(f"Stopped by {signal.Signals(number).name}. To go on:\n{command}")
        sys.exit(128 + number)


def main(args):
    accelerator = create_accelerator(args)
    # Whatever can be wrong is found before a model is loaded.
    noise_scheduler, vae_config, timesteps = check_checkpoint(args)
    checkpoints = Checkpoints(args, accelerator)
    set_run_seed(args, checkpoints.saved)
    pairs, eval_pairs = open_pairs(args, accelerator, timesteps, vae_config)
    dataloader = create_dataloader(args, pairs)
    train_dataloader = accelerator.prepare(dataloader)
    state = create_state(args, accelerator, pairs, len(train_dataloader))
    checkpoints.check(state)

    pipeline = load_pipeline(args, accelerator)
    policy = create_policy(args, pipeline.unet)
    optimizer, lr_scheduler = create_optimizer(args, accelerator, policy)
    # `unet` is what gradients are averaged through; `policy`, the model in it, is the reference and the encoder too.
    unet, optimizer, lr_scheduler = accelerator.prepare(policy, optimizer, lr_scheduler)
    checkpoints.load(policy, state)
    models, saved = (policy, pipeline, noise_scheduler), checkpoints.saved
    perception, weights = create_perception(args, accelerator, train_dataloader, *models, timesteps, saved, state)
    monitor = Monitor(args, accelerator, state, timesteps)
    with ncp_loss.adapters_disabled(policy):
        log_validation(args, accelerator, pipeline, 0)
    # Of a resumed run as well: what stopped it may have come between its checkpoint and this.
    if monitor.validates and eval_pairs is not None:
        measure_held_out(args, accelerator, eval_pairs, *models, perception, weights, monitor)

    unet.train()
    signals, stops, tables = StopSignals(), False, []
    for batch, num_batches in remaining_batches(args, accelerator, train_dataloader, dataloader.sampler, state):
        monitor.report_skipped_pairs(batch["skipped"])
        with accelerator.accumulate(unet):
            denoising = noise_batch(args, batch, pipeline, noise_scheduler)
            errors = measure_errors(args, denoising, unet, policy, perception, weights)
            loss = measure_loss(args, errors, batch).loss
            # accelerate divides by the flag, even where an epoch's last step has fewer batches.
            accelerator.backward(loss * args.gradient_accumulation_steps / num_batches)
            tables.append(tabulate(batch, errors))
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                # Where no step may be skipped, the run ends before it saves anything.
                if args.max_skipped_steps > 0 and not grad_norm.isfinite():
                    optimizer.zero_grad()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        state["global_step"] += 1
        monitor.record(tables, grad_norm, lr_scheduler.get_last_lr()[0])
        tables.clear()
        stops = signals.reached(accelerator)
        ends = state["global_step"] == args.max_train_steps
        saves = ends or stops or state["global_step"] % args.checkpointing_steps == 0
        if monitor.validates or saves:
            monitor.flush()
        if saves:
            checkpoints.save(state)
        if stops:
            break
        if monitor.validates and eval_pairs is not None:
            measure_held_out(args, accelerator, eval_pairs, *models, perception, weights, monitor)
        if monitor.validates and not ends:
            log_validation(args, accelerator, pipeline, state["global_step"])

    accelerator.wait_for_everyone()
    # A wrapped model that outlives its process group destroys it with Python's lock held, which gloo's threads want.
    unet, optimizer, lr_scheduler = accelerator.free_memory(unet, optimizer, lr_scheduler)
    if stops:
        signals.stop(args, accelerator)
    if accelerator.is_main_process:
        checkpoints.save_lora(args.output_dir)
        log_validation(args, accelerator, pipeline, args.max_train_steps)
        finish(args, accelerator, policy, state)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
