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

"""Trains a LoRA for Stable Diffusion 1.x or 2.x on preference pairs, by DPO, IPO, hinge, CPO or SFT, in the feature space of
the frozen U-Net's encoder (Noise-Conditioned Perception, arXiv:2406.17636) or in latent space.

    accelerate launch train_ncp_dpo_sd15.py \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name kashif/pickascore \
      --dataset_split_name validation --mixed_precision bf16 --rank 64 --use_8bit_adam --gradient_checkpointing \
      --learning_rate 1e-5 --max_train_steps 1000 --output_dir ncp-dpo-sd15

The U-Net with its LoRA is the policy; the same U-Net with the LoRA switched off is both the reference model and the
perceptual encoder. What a pair sees (timestep, noise, flip, crop) depends on the seed, the epoch and its row alone.
"""

import argparse
import bisect
import contextlib
import io
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import accelerate
import datasets
import numpy as np
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, broadcast_object_list, send_to_device, set_seed
from datasets.distributed import split_dataset_by_node
from datasets.fingerprint import Hasher
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from ncp_loss import (
    LAYERS,
    LOSS_TYPES,
    REFERENCE_FREE_LOSS_TYPES,
    TARGET_TIMESTEPS,
    NoiseConditionedPerception,
    StepTable,
    adapters_disabled,
    latent_error,
    preference_loss,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import (
    check_min_version,
    convert_state_dict_to_diffusers,
    convert_unet_state_dict_to_peft,
    is_wandb_available,
    make_image_grid,
)


if is_wandb_available():
    import wandb

# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.35.0")

logger = get_logger(__name__)

PIPELINE_CLASS = StableDiffusionPipeline
# Off for validation, where it would paint over what is to be judged.
PIPELINE_OPTIONS = {"safety_checker": None}
STATE_NAME = "training_state.json"
ERROR_SCALE_PAIRS = 64
# What may differ when a run is resumed: it does not change what is learnt.
FREE_ARGUMENTS = {
    "output_dir",
    "max_train_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "allow_resume_changes",
    "max_skipped_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "gradient_checkpointing",
    "compile",
    "channels_last",
    "dataloader_num_workers",
    "cache_dir",
    "cache_latents",
    "vae_encode_batch_size",
    "local_rank",
    "report_to",
    "tracker_name",
    "logging_dir",
    "run_validation",
    "validation_prompt",
    "num_validation_images",
    "validation_steps",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
}
# What an error scale is measured for.
ERROR_ARGUMENTS = ("loss_space", "ncp_layer", "ncp_timestep", "ncp_probe_rms")
CACHE_CHUNK = 200
CACHE_ARGUMENTS = (
    "resolution",
    "image_interpolation_mode",
    "no_hflip",
    "loss_type",
    "image_0_column",
    "image_1_column",
    "label_column",
    "caption_column",
)
# Less the one whose steps there is no flag for.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
PROGRESS_METRICS = ("loss", "implicit_accuracy", "margin")


def save_model_card(args, num_processes, error_scale):
    """Writes `README.md`: what the LoRA was trained on and how, validation images, how to load it."""
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    settings = {
        "loss": f"{args.loss_type} in {args.loss_space} space",
        "steps": args.max_train_steps,
        "pairs per step": args.train_batch_size * args.gradient_accumulation_steps * num_processes,
        "β": args.beta_dpo,
        "learning rate": args.learning_rate,
        "LoRA rank": args.rank,
        "resolution": args.resolution,
        "mixed precision": args.mixed_precision,
        "seed": args.seed,
    }
    if args.loss_space == "ncp":
        settings["features"] = f"{args.ncp_layer} block, {args.ncp_timestep} timestep"
        settings["error scale"] = f"`--ncp_error_scale {error_scale}`"
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    pictures = ""
    if args.run_validation:
        pictures = (
            f"\nBefore (top) and after (bottom), from the same noise: *{args.validation_prompt}*\n\n"
            "![before and after](validation/before_after.png)\n"
        )
    card_data = ModelCardData(
        base_model=args.pretrained_model_name_or_path,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "diffusers-training", "lora", "ncp-dpo"],
    )
    ModelCard(
        f"""---
{card_data.to_yaml()}
---

# {repo_id}

A LoRA for `{args.pretrained_model_name_or_path}`, trained on the preference pairs of
`{args.dataset_name or args.train_data_dir}` with
[Noise-Conditioned Perception](https://huggingface.co/papers/2406.17636).
{pictures}
| setting | value |
|---|---|
{table}

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{args.pretrained_model_name_or_path}", torch_dtype=torch.float16)
pipeline.to("cuda").load_lora_weights("{repo_id}")
image = pipeline({json.dumps(args.validation_prompt or "a photo of an astronaut")}).images[0]
```
"""
    ).save(Path(args.output_dir) / "README.md")


def log_validation(args, accelerator, unet, components, weight_dtype, global_step):
    """
    Draws `num_validation_images` images of `validation_prompt` into `validation/step-N.png` and the trackers. Their noise is
    the same at every step; step 0 shows the base model.
    """
    logger.info(f"Drawing {args.num_validation_images} validation images at step {global_step}")
    if not components:
        # Freed by --cache_latents. The pipeline loads the rest, but the VAE in a precision that SDXL's does not bear.
        components = {"vae": AutoencoderKL.from_pretrained(**vae_source(args))}
    pipeline = PIPELINE_CLASS.from_pretrained(
        args.pretrained_model_name_or_path,
        unet=unet,
        revision=args.revision,
        variant=args.variant,
        torch_dtype=weight_dtype,
        **components,
        **PIPELINE_OPTIONS,
    ).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for index in range(args.num_validation_images):
        latents = pipeline(
            args.validation_prompt,
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=25,
            generator=torch.Generator(accelerator.device).manual_seed(args.seed + index),
            output_type="latent",
        ).images
        # Decoded here, since pipelines decode in the dtype of the latents, in which SDXL's VAE overflows.
        with torch.no_grad():
            image = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor).sample
        images += pipeline.image_processor.postprocess(image)

    folder = Path(args.output_dir) / "validation"
    folder.mkdir(exist_ok=True)
    make_image_grid(images, rows=1, cols=len(images)).save(folder / f"step-{global_step}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            batch = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images("validation", batch, global_step, dataformats="NHWC")
        elif tracker.name == "wandb":
            pictures = [wandb.Image(image, caption=args.validation_prompt) for image in images]
            tracker.log({"validation": pictures}, step=global_step)


def add_common_arguments(parser):
    """The arguments of both scripts. Those that diffusers' examples have keep their names, defaults and meaning."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", type=str, required=True, help="Hub id or folder of the base model."
    )
    model.add_argument("--revision", type=str, default=None, help="Revision of the base model on the hub.")
    model.add_argument("--variant", type=str, default=None, help="Variant of the model files, e.g. fp16.")
    model.add_argument("--rank", type=int, default=4, help="Rank of the LoRA. The paper uses 64.")
    model.add_argument(
        "--lora_alpha", type=int, default=None, help="Scale of the LoRA times its rank. Default: the rank."
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name",
        type=str,
        default=None,
        help="Hub id, or a local folder of parquet files, of preference pairs.",
    )
    data.add_argument("--dataset_config_name", type=str, default=None, help="Configuration of the dataset.")
    data.add_argument("--dataset_split_name", type=str, default="train", help="Split of the dataset to train on.")
    data.add_argument(
        "--train_data_dir",
        type=str,
        default=None,
        help=(
            "Folder of images with a `metadata.jsonl` whose rows give `jpg_0_file_name`, `jpg_1_file_name`, `label_0` and"
            " `caption` (or what the column flags say instead)."
        ),
    )
    data.add_argument("--image_0_column", type=str, default="jpg_0", help="Column of the first image, bytes or image.")
    data.add_argument("--image_1_column", type=str, default="jpg_1", help="Column of the second image.")
    data.add_argument(
        "--label_column",
        type=str,
        default="label_0",
        help="Column that says who won: 1 the first image, 0 the second, 0.5 neither (a tie, which is left out).",
    )
    data.add_argument("--caption_column", type=str, default="caption", help="Column of the prompt.")
    data.add_argument("--max_train_samples", type=int, default=None, help="Train on the first so many pairs only.")
    data.add_argument(
        "--streaming", action="store_true", help="Read the dataset while training instead of storing it first."
    )
    data.add_argument("--shuffle_buffer_size", type=int, default=1000, help="Pairs to draw from when streaming.")
    data.add_argument(
        "--on_bad_sample",
        type=str,
        default="error",
        help="What to do about a pair that cannot be read: stop (error) or take the next one and say so (skip).",
    )
    data.add_argument(
        "--cache_dir", type=str, default=None, help="Where downloaded datasets and the cache are stored."
    )
    data.add_argument(
        "--cache_latents",
        action="store_true",
        help="Encode images and captions once, store them, and free the VAE and the text encoders.",
    )
    data.add_argument("--resolution", type=int, default=512, help="Side of the square that images are cropped to.")
    data.add_argument("--random_crop", action="store_true", help="Crop at random instead of the centre.")
    data.add_argument("--no_hflip", action="store_true", help="Do not flip half of the pairs horizontally.")
    data.add_argument(
        "--image_interpolation_mode",
        type=str,
        default="lanczos",
        help=f"How images are resized: {', '.join(mode.name.lower() for mode in Image.Resampling)}.",
    )
    data.add_argument("--vae_encode_batch_size", type=int, default=8, help="Images or captions to encode at once.")
    data.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that load images; 0 is the main one."
    )

    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss_type", type=str, default="dpo", help=f"One of {', '.join(LOSS_TYPES)}.")
    loss.add_argument(
        "--loss_space",
        type=str,
        default="ncp",
        help="Where errors are measured: in the frozen U-Net's features (ncp) or in latent space (latent).",
    )
    loss.add_argument(
        "--beta_dpo",
        type=float,
        default=5000,
        help="β, the weight of the KL divergence from the reference, in the loss as ½·β.",
    )
    loss.add_argument("--sft_weight", type=float, default=1.0, help="λ, the weight of the winner's error in cpo.")
    loss.add_argument(
        "--label_smoothing", type=float, default=0.0, help="Share of labels taken to be wrong, 0 to 0.5 (dpo and cpo)."
    )
    loss.add_argument(
        "--ncp_layer", type=str, default="mid", help=f"Block whose features count: {' or '.join(LAYERS)}."
    )
    loss.add_argument(
        "--ncp_timestep",
        type=str,
        default="previous",
        help=f"Timestep that the features see, relative to the prediction's: {', '.join(TARGET_TIMESTEPS)}.",
    )
    loss.add_argument(
        "--ncp_probe_rms",
        type=float,
        default=None,
        help=(
            "Size to which steps in latent space are enlarged so that half precision resolves them; 0 is the literal"
            " formula. Default: by precision."
        ),
    )
    loss.add_argument(
        "--ncp_error_scale",
        type=error_scale_argument,
        default="auto",
        help=(
            "Factor that brings perceptual errors to the size of latent ones, so that β, λ and the learning rate mean the"
            " same in both spaces. `auto` measures it before training; 1 is the paper as written."
        ),
    )

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", type=str, default="ncp-dpo-lora", help="Where everything is written.")
    training.add_argument("--seed", type=int, default=None, help="Default: a random one, which is printed.")
    training.add_argument("--train_batch_size", type=int, default=4, help="Pairs per process and step.")
    training.add_argument("--num_train_epochs", type=int, default=1, help="Ignored if `--max_train_steps` is given.")
    training.add_argument("--max_train_steps", type=int, default=None, help="Optimization steps in total.")
    training.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Batches per optimization step.")
    training.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="Recompute activations to save memory, at the cost of time.",
    )
    training.add_argument(
        "--mixed_precision",
        type=str,
        default=None,
        choices=["no", "fp16", "bf16"],
        help="Precision of all but the LoRA's weights. Default: accelerate's configuration.",
    )
    training.add_argument(
        "--compile", action="store_true", help="Compile the U-Net's transformer blocks; the first steps take minutes."
    )
    training.add_argument(
        "--channels_last",
        action="store_true",
        help="Keep the U-Net's convolutions in the channels-last memory format.",
    )
    training.add_argument("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs use TF32 in fp32.")
    training.add_argument("--learning_rate", type=float, default=5e-4)
    training.add_argument(
        "--scale_lr", action="store_true", help="Multiply the learning rate by processes, accumulation and batch size."
    )
    training.add_argument(
        "--lr_scheduler",
        type=str,
        default="constant",
        help=f"One of {', '.join(LR_SCHEDULERS)}.",
    )
    training.add_argument("--lr_warmup_steps", type=int, default=500, help="For schedules with a warm-up.")
    training.add_argument("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    training.add_argument("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    training.add_argument("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    training.add_argument("--adam_beta1", type=float, default=0.9)
    training.add_argument("--adam_beta2", type=float, default=0.999)
    training.add_argument("--adam_weight_decay", type=float, default=1e-2)
    training.add_argument("--adam_epsilon", type=float, default=1e-8)
    training.add_argument("--max_grad_norm", type=float, default=1.0)
    training.add_argument("--local_rank", type=int, default=-1, help="Set by the launcher.")

    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    checkpoints.add_argument("--checkpoints_total_limit", type=int, default=None, help="Checkpoints to keep.")
    checkpoints.add_argument(
        "--resume_from_checkpoint",
        type=str,
        default=None,
        help="A checkpoint's folder, its name in `--output_dir`, or `latest`.",
    )
    checkpoints.add_argument(
        "--allow_resume_changes", action="store_true", help="Resume although settings differ from the checkpoint's."
    )
    checkpoints.add_argument(
        "--max_skipped_steps",
        type=int,
        default=0,
        help="Steps in a row that may be skipped for a loss or gradient that is not finite before the run stops.",
    )

    reports = parser.add_argument_group("reports")
    reports.add_argument("--report_to", type=str, default="tensorboard", help="tensorboard, wandb, all, …")
    reports.add_argument(
        "--tracker_name", type=str, default="ncp-dpo-lora", help="Name of the project in the tracker."
    )
    reports.add_argument(
        "--logging_dir", type=str, default="logs", help="Folder within `--output_dir` for the tracker."
    )
    reports.add_argument("--run_validation", action="store_true", help="Draw images before, while and after training.")
    reports.add_argument("--validation_prompt", type=str, default=None, help="What to draw.")
    reports.add_argument("--num_validation_images", type=int, default=4)
    reports.add_argument("--validation_steps", type=int, default=200, help="Steps between validations.")
    reports.add_argument("--push_to_hub", action="store_true", help="Upload `--output_dir`, less its checkpoints.")
    reports.add_argument("--hub_token", type=str, default=None)
    reports.add_argument("--hub_model_id", type=str, default=None, help="Default: the name of `--output_dir`.")


def error_scale_argument(value):
    return value if value == "auto" else float(value)


def check_arguments(args):
    """Raises a `ValueError` that names the flag for whatever can be known to be wrong before anything is loaded."""
    for flag, allowed in [
        ("loss_type", LOSS_TYPES),
        ("loss_space", ("ncp", "latent")),
        ("ncp_layer", LAYERS),
        ("ncp_timestep", TARGET_TIMESTEPS),
        ("on_bad_sample", ("error", "skip")),
        ("image_interpolation_mode", [mode.name.lower() for mode in Image.Resampling]),
        ("lr_scheduler", LR_SCHEDULERS),
    ]:
        if getattr(args, flag) not in allowed:
            raise ValueError(f"--{flag} is {getattr(args, flag)!r}, but must be one of {', '.join(allowed)}.")
    for flag in [
        "rank",
        "lora_alpha",
        "resolution",
        "train_batch_size",
        "vae_encode_batch_size",
        "shuffle_buffer_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_train_steps",
        "max_train_samples",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
        "num_validation_images",
    ]:
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} is {getattr(args, flag)}, but must be at least 1.")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("Give the preference pairs by exactly one of --dataset_name and --train_data_dir.")
    if args.cache_latents and args.random_crop:
        raise ValueError("--cache_latents stores one crop of every image: --random_crop does not go with it.")
    if args.streaming and (args.train_data_dir is not None or args.cache_latents or args.max_train_steps is None):
        raise ValueError("--streaming needs a --dataset_name and --max_train_steps, and no --cache_latents.")
    if not args.beta_dpo > 0:
        raise ValueError(f"--beta_dpo is {args.beta_dpo}, but must be greater than 0.")
    if not 0 <= args.label_smoothing < 0.5:
        raise ValueError(f"--label_smoothing is {args.label_smoothing}, but must be in [0, 0.5).")
    if args.label_smoothing and args.loss_type not in ("dpo", "cpo"):
        raise ValueError(f"--label_smoothing goes with --loss_type dpo or cpo, not {args.loss_type}.")
    if args.ncp_probe_rms is not None and not args.ncp_probe_rms >= 0:
        raise ValueError(f"--ncp_probe_rms is {args.ncp_probe_rms}, but must be at least 0.")
    if args.ncp_error_scale != "auto" and not 0 < args.ncp_error_scale < math.inf:
        raise ValueError(f"--ncp_error_scale is {args.ncp_error_scale}, but must be `auto` or greater than 0.")
    if args.run_validation and args.validation_prompt is None:
        raise ValueError("--run_validation needs a --validation_prompt.")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise ValueError("--hub_token would show up in wandb's logs. Use `hf auth login` instead.")
    if args.report_to == "wandb" and not is_wandb_available():
        raise ImportError("To report to wandb, please install it: `pip install wandb`.")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(output_dir="ncp-dpo-sd15-lora", tracker_name="ncp-dpo-sd15-lora")
    args = parser.parse_args(input_args)
    check_arguments(args)
    return args


def load_pairs(args):
    """
    Opens the dataset, images still encoded, and finds the rows to train on.

    Returns:
        `datasets.Dataset` and `list[int]`, all rows and the numbers of those with a winner; with `--streaming`
        `datasets.IterableDataset` and `None`.

    Raises:
        `ValueError`: names the flag, column, file or row that is wrong.
    """
    if args.train_data_dir is not None:
        dataset = load_image_folder(args)
    else:
        dataset = datasets.load_dataset(
            args.dataset_name,
            args.dataset_config_name,
            split=args.dataset_split_name,
            cache_dir=args.cache_dir,
            streaming=args.streaming,
        )
    for flag in ("image_0_column", "image_1_column", "label_column", "caption_column"):
        column = getattr(args, flag)
        if column not in dataset.column_names:
            raise ValueError(
                f"--{flag} is {column!r}, but the columns of {args.dataset_name or args.train_data_dir} are"
                f" {', '.join(dataset.column_names)}."
            )
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    if args.streaming:
        dataset = dataset if args.max_train_samples is None else dataset.take(args.max_train_samples)
        return dataset, None

    rows = []
    for row, (label, caption) in enumerate(zip(dataset[args.label_column], dataset[args.caption_column])):
        if check_pair(args, row, label, caption):
            rows.append(row)
    logger.info(f"{len(rows)} pairs with a winner; {len(dataset) - len(rows)} ties are left out")
    if not rows:
        raise ValueError(
            f"No pair is left: {args.dataset_name or args.train_data_dir} has {len(dataset)} rows, all ties."
        )
    return dataset, rows[: args.max_train_samples]


def check_pair(args, row, label, caption):
    """Whether a pair has a winner; a `ValueError` for any label or caption that is none."""
    if label not in (0, 0.5, 1):
        raise ValueError(f"Row {row}: {args.label_column} is {label!r}, but must be 1, 0, or 0.5 for a tie.")
    if not isinstance(caption, str):
        raise ValueError(f"Row {row}: {args.caption_column} is {caption!r}, but must be a text.")
    return label != 0.5


def load_image_folder(args):
    # Not datasets' own image folder: it takes a metadata file that names a missing image for no metadata at all.
    folder = Path(args.train_data_dir).resolve()
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise ValueError(f"--train_data_dir: there is no file {metadata}.")
    dataset = datasets.load_dataset("json", data_files=str(metadata), split="train", cache_dir=args.cache_dir)
    for column in (args.image_0_column, args.image_1_column):
        name_column = f"{column}_file_name"
        if name_column not in dataset.column_names:
            raise ValueError(f"{metadata} has no {name_column}, but {', '.join(dataset.column_names)}.")
        paths = []
        for row, name in enumerate(dataset[name_column]):
            path = (folder / str(name)).resolve()
            if not path.is_relative_to(folder) or not path.is_file():
                raise ValueError(f"{metadata}, row {row}: {name_column} {name!r} is not a file in {folder}.")
            paths.append(str(path))
        dataset = dataset.remove_columns(name_column).add_column(column, paths)
    return dataset


class EpochSampler(torch.utils.data.Sampler):
    """Every row once per epoch in an order that only the seed and the epoch decide, as `(epoch, row)`."""

    def __init__(self, rows, seed):
        self.rows = rows
        self.seed = seed
        # Not by `set_epoch`, which some versions of accelerate call with numbers of their own.
        self.epoch = 0

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        for index in np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows)):
            yield self.epoch, self.rows[index]


class UnreadableImage(ValueError):
    """Names the row, its caption, the column and what is wrong with the image."""


class PreferencePairs(torch.utils.data.Dataset):
    """
    Pairs as training sees them in an epoch: `pairs[epoch, row]`.

    Args:
        dataset (`datasets.Dataset`): images, label and caption.
        rows (`list[int]`): the rows with a winner, ascending.
        args (`argparse.Namespace`): columns, resolution, crop, flip, seed, and what to do about unreadable images.
        latent_shape (`tuple`): `(C, H, W)` of an image's latents.
        num_train_timesteps (`int`): timesteps are drawn from 0 to this, exclusively.
    """

    def __init__(self, dataset, rows, args, latent_shape, num_train_timesteps):
        self.dataset = dataset
        self.rows = rows
        self.args = args
        self.latent_shape = latent_shape
        self.num_train_timesteps = num_train_timesteps

    def __getitem__(self, key):
        epoch, identity = key
        row, skipped = identity, []
        while True:
            try:
                return {**self.example(epoch, row, identity, self.dataset[row]), "skipped": skipped}
            except UnreadableImage as error:
                skipped.append(str(error))
                if self.args.on_bad_sample == "error" or len(skipped) == len(self.rows):
                    raise
            row = self.rows[bisect.bisect(self.rows, row) % len(self.rows)]

    def example(self, epoch, row, identity, values):
        # Randomness belongs to the pair (a substitute has that of the one it stands for), so that neither processes nor
        # workers nor a resume can change it.
        seed = np.random.SeedSequence([self.args.seed, epoch, identity]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        crop_position = torch.rand(2, generator=generator).tolist() if self.args.random_crop else (0.5, 0.5)
        flip = bool(torch.rand((), generator=generator) < 0.5) and not self.args.no_hflip
        timestep = torch.randint(self.num_train_timesteps, (), generator=generator)
        noise, variance_noise = torch.randn(2, *self.latent_shape, generator=generator)
        return {
            **self.read(row, values, crop_position, flip),
            "timesteps": timestep,
            "noise": noise,
            "variance_noise": variance_noise,
            "rows": torch.tensor(row),
        }

    def read(self, row, values, crop_position, flip):
        """The winner and, except for sft, the loser, as `images`, and the `caption`."""
        columns = [self.args.image_0_column, self.args.image_1_column]
        if values[self.args.label_column] == 0:
            columns.reverse()
        images = []
        for column in columns[:1] if self.args.loss_type == "sft" else columns:
            try:
                image = read_image(values[column])
            except Exception as error:
                # By its caption a pair is found in a stream as well, where rows are numbered as they are shuffled.
                caption = values[self.args.caption_column]
                raise UnreadableImage(
                    f"Row {row} ({caption!r:.80}): {column} cannot be read as an image: {error}"
                ) from error
            images.append(preprocess_image(image, self.args, crop_position, flip))
        return {"images": images, "caption": values[self.args.caption_column]}


class CachedPairs(PreferencePairs):
    """
    The same pairs with `latents` instead of `pixel_values` and `prompt` instead of the caption.

    Args:
        images (`datasets.Dataset`): `row` and `tensors`, what `read` gives for it, unflipped and flipped.
        prompts (`datasets.Dataset`): `caption` and `tensors`, what `encode_prompt` gives for it.
    """

    def __init__(self, images, prompts, *arguments):
        super().__init__(*arguments)
        self.images, self.prompts = images, prompts
        self.image_index = {row: index for index, row in enumerate(images["row"])}
        self.prompt_index = {caption: index for index, caption in enumerate(prompts["caption"])}
        # Only the caption is read of the dataset from now on.
        self.dataset = self.dataset.select_columns(self.args.caption_column)

    def read(self, row, values, crop_position, flip):
        stored = self.images[self.image_index[row]]
        if stored["error"]:
            raise UnreadableImage(stored["error"])
        images = safetensors.torch.load(stored["tensors"])
        prompt = self.prompts[self.prompt_index[values[self.args.caption_column]]]
        return {
            "images": [
                {name: values[index, int(flip)] for name, values in images.items()}
                for index in range(len(images["latents"]))
            ],
            "prompt": safetensors.torch.load(prompt["tensors"]),
        }


class StreamedPairs(torch.utils.data.IterableDataset, PreferencePairs):
    """The same pairs in the order of a shuffled stream, epoch after epoch without end."""

    def __iter__(self):
        ties, skipped = 0, []
        for epoch in itertools.count():
            stream = self.dataset.shuffle(seed=self.args.seed, buffer_size=self.args.shuffle_buffer_size)
            stream.set_epoch(epoch)
            anything = False
            for row, values in enumerate(stream):
                caption = values[self.args.caption_column]
                if not check_pair(self.args, row, values[self.args.label_column], caption):
                    ties += 1
                    continue
                # A stream has no row numbers that all workers agree on, so a pair is known by its content.
                content = [values[self.args.image_0_column], values[self.args.image_1_column], caption]
                try:
                    example = self.example(epoch, row, zlib.crc32(repr(content).encode()), values)
                except UnreadableImage as error:
                    if self.args.on_bad_sample == "error":
                        raise
                    skipped.append(str(error))
                    continue
                anything = True
                yield {**example, "ties": ties, "skipped": skipped}
                ties, skipped = 0, []
            if not anything:
                # More workers than files, or nothing to train on, which the first look at the data finds out.
                return


def read_image(value):
    """An image in RGB, upright, transparency on white, from encoded bytes, datasets' `{"bytes", "path"}` or a path."""
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(value) if isinstance(value, bytes) else value))
    if image.mode.startswith("I"):
        # 16 bit, which PIL would clip instead of scaling.
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(image, args, crop_position, flip):
    """
    Resizes an image by its shorter side and crops a square.

    Args:
        image (`PIL.Image.Image`): in RGB.
        args (`argparse.Namespace`): `resolution` and `image_interpolation_mode`.
        crop_position (`tuple`): where to crop, 0 (top, left) to 1 (bottom, right).
        flip (`bool`): mirror the image first.

    Returns:
        `torch.Tensor` of shape `(3, resolution, resolution)` in [-1, 1], and the crop's `(top, left)` in pixels.
    """
    scale = args.resolution / min(image.size)
    size = [max(args.resolution, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling[args.image_interpolation_mode.upper()])
    if flip:
        image = ImageOps.mirror(image)
    top = round(crop_position[0] * (image.height - args.resolution))
    left = round(crop_position[1] * (image.width - args.resolution))
    image = image.crop((left, top, left + args.resolution, top + args.resolution))
    pixel_values = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))
    return VaeImageProcessor.normalize(pixel_values)[0], (top, left)


def preprocess_image(image, args, crop_position, flip):
    pixel_values, _ = resize_and_crop(image, args, crop_position, flip)
    return {"pixel_values": pixel_values}


def collate_fn(examples):
    """Stacks pairs; what belongs to images (`pixel_values`, …) has the winners first, then the losers."""
    batch = {
        "skipped": [reason for example in examples for reason in example.pop("skipped")],
        "ties": sum(example.pop("ties", 0) for example in examples),
    }
    if "caption" in examples[0]:
        batch["captions"] = [example.pop("caption") for example in examples]
    else:
        batch["prompt"] = default_collate([example.pop("prompt") for example in examples])
    images = [image for images in zip(*(example.pop("images") for example in examples)) for image in images]
    return {**batch, **default_collate(images), **default_collate(examples)}


def settle_seed(args):
    """Draws a seed if there is none, the same on every process."""
    if args.seed is None:
        args.seed = broadcast_object_list([int(np.random.SeedSequence().generate_state(1)[0])])[0]
        logger.info(f"Drew --seed {args.seed}")
    set_seed(args.seed)


def vae_source(args):
    """Where the VAE is, as arguments of its `from_pretrained`."""
    return {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "subfolder": "vae",
        "revision": args.revision,
        "variant": args.variant,
    }


def load_components(args, accelerator, weight_dtype):
    """The frozen models beside the U-Net and their tokenizers, by their names in the pipeline."""
    options = {"revision": args.revision, "variant": args.variant}
    text_encoder = CLIPTextModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="text_encoder", **options
    )
    vae = AutoencoderKL.from_pretrained(**vae_source(args))
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="tokenizer", revision=args.revision
        ),
        "text_encoder": text_encoder.requires_grad_(False).to(accelerator.device, dtype=weight_dtype),
        "vae": vae.requires_grad_(False).to(accelerator.device, dtype=torch.float32),
    }


@torch.no_grad()
def encode_prompt(components, captions):
    """Text embeddings of captions: `prompt_embeds` of shape `(B, L, D)`."""
    tokenizer, text_encoder = components["tokenizer"], components["text_encoder"]
    input_ids = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return {"prompt_embeds": text_encoder(input_ids.to(text_encoder.device))[0]}


def prompt_conditioning(prompt, batch, images_per_pair):
    """`encoder_hidden_states` of shape `(N, L, D)` and `added_cond_kwargs`, which is `None` here, for N images."""
    return prompt["prompt_embeds"].repeat(images_per_pair, 1, 1), None


@torch.no_grad()
def encode_images(vae, pixel_values, batch_size):
    """Latents of images, the posterior's mode: `(N, 3, H, W)` to `(N, C, h, w)` in float32."""
    latents = [vae.encode(pixels.to(vae.dtype)).latent_dist.mode() for pixels in pixel_values.split(batch_size)]
    return torch.cat(latents).float() * vae.config.scaling_factor


def create_accelerator(args):
    """Sets up accelerate, logging, the output folder and, if asked for, the repository on the hub."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
    )
    args.mixed_precision = accelerator.mixed_precision
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    logger.info(accelerator.state, main_process_only=False)
    if not accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.set_verbosity_error()

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32

    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        if args.push_to_hub:
            args.hub_model_id = create_repo(
                args.hub_model_id or Path(args.output_dir).resolve().name, exist_ok=True, token=args.hub_token
            ).repo_id
    return accelerator


def load_configurations(args):
    """The noise scheduler, and `(C, H, W)` of the latents from the VAE's configuration: all that data needs to know."""
    noise_scheduler = DDPMScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision
    )
    if args.loss_space == "ncp":
        StepTable.from_scheduler(noise_scheduler, args.ncp_timestep)
    source = vae_source(args)
    vae_config = AutoencoderKL.load_config(
        source["pretrained_model_name_or_path"], subfolder=source["subfolder"], revision=source["revision"]
    )
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if args.resolution % factor:
        raise ValueError(f"--resolution is {args.resolution}, but must be a multiple of {factor}, the VAE's factor.")
    side = args.resolution // factor
    return noise_scheduler, (vae_config["latent_channels"], side, side)


def open_pairs(args, accelerator, latent_shape, num_train_timesteps):
    """The pairs to train on, of which the first batch is known to be readable."""
    dataset, rows = load_pairs(args)
    global_batch_size = args.train_batch_size * accelerator.num_processes
    if args.streaming:
        dataset = split_dataset_by_node(dataset, accelerator.process_index, accelerator.num_processes)
        pairs = StreamedPairs(dataset, None, args, latent_shape, num_train_timesteps)
        if not list(itertools.islice(pairs, args.train_batch_size)):
            raise ValueError(f"No pair is left: {args.dataset_name} has no row with a winner.")
        return pairs

    tail = len(rows) % global_batch_size
    if tail == len(rows):
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} on {accelerator.num_processes} process(es) takes"
            f" {global_batch_size} pairs, but there are {len(rows)}."
        )
    if tail:
        logger.info(f"{tail} of {len(rows)} pairs do not fill a batch: every epoch leaves others out")
    pairs = PreferencePairs(dataset, rows, args, latent_shape, num_train_timesteps)
    for key in itertools.islice(EpochSampler(rows, args.seed), args.train_batch_size):
        pairs[key]
    return pairs


def cache_pairs(args, accelerator, pairs, components, weight_dtype):
    """
    Encodes every image and every caption once and stores them, or finds them stored. All that decides what is stored goes
    into the folder's name, the weights of the models and the data included. Latents are kept in float16 if training is in
    half precision, else in float32; embeddings as they are.

    Returns:
        `CachedPairs`
    """
    flips = [False] if args.no_hflip else [False, True]
    latent_dtype = torch.float32 if weight_dtype == torch.float32 else torch.float16

    def encode_row(row):
        try:
            views = [pairs.read(row, pairs.dataset[row], (0.5, 0.5), flip)["images"] for flip in flips]
        except UnreadableImage as error:
            if args.on_bad_sample == "error":
                raise
            return {"tensors": b"", "error": str(error)}
        # Two dimensions come in front of each tensor: winner and loser, unflipped and flipped.
        images = default_collate([default_collate(list(view)) for view in zip(*views)])
        pixel_values = images.pop("pixel_values")
        latents = encode_images(
            components["vae"], pixel_values.flatten(0, 1).to(accelerator.device), args.vae_encode_batch_size
        )
        images["latents"] = latents.unflatten(0, pixel_values.shape[:2]).to("cpu", latent_dtype).contiguous()
        return {"tensors": safetensors.torch.save(images), "error": ""}

    def encode_rows(batch):
        return default_collate([encode_row(row) for row in batch["row"]])

    def encode_captions(batch):
        prompts = encode_prompt(components, batch["caption"])
        tensors = [dict(zip(prompts, values)) for values in zip(*(value.cpu() for value in prompts.values()))]
        return {"tensors": [safetensors.torch.save(prompt) for prompt in tensors]}

    captions = pairs.dataset.select(pairs.rows)[args.caption_column]
    key = Hasher.hash(
        [
            pairs.dataset._fingerprint,
            image_folder_state(args),
            pairs.rows,
            {name: getattr(args, name) for name in CACHE_ARGUMENTS},
            weight_dtype,
            [model.state_dict() for model in components.values() if isinstance(model, torch.nn.Module)],
        ]
    )
    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "ncp_dpo" / key
    logger.info(f"Latents and text embeddings are stored in {folder}")
    images = map_in_chunks(accelerator, folder, "row", pairs.rows, encode_rows, batch_size=1)
    prompts = map_in_chunks(
        accelerator, folder, "caption", list(dict.fromkeys(captions)), encode_captions, args.vae_encode_batch_size
    )
    return CachedPairs(images, prompts, pairs.dataset, pairs.rows, args, pairs.latent_shape, pairs.num_train_timesteps)


def map_in_chunks(accelerator, folder, column, values, function, batch_size):
    # One file per chunk: processes share the work, none waits long for another, and what an interrupted run has stored is kept.
    folder.mkdir(parents=True, exist_ok=True)
    size = min(CACHE_CHUNK, math.ceil(len(values) / accelerator.num_processes))
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    files = [str(folder / f"{column}-{size}-{index}.arrow") for index in range(len(chunks))]
    for index in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        datasets.Dataset.from_dict({column: chunks[index]}).map(
            function,
            batched=True,
            batch_size=batch_size,
            cache_file_name=files[index],
            new_fingerprint=f"{folder.name}-{column}-{size}-{index}",
            desc=f"Encoding {column}s, part {index + 1} of {len(chunks)}",
        )
    accelerator.wait_for_everyone()
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is on another machine: give a --cache_dir that all machines share.")
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def image_folder_state(args):
    # What datasets does not look at: images that metadata.jsonl names may change while it stays the same.
    if args.train_data_dir is None:
        return None
    files = sorted(path for path in Path(args.train_data_dir).rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def create_dataloader(args, pairs):
    """Batches of pairs, shuffled anew every epoch; what fills no batch is left out."""
    return torch.utils.data.DataLoader(
        pairs,
        batch_size=args.train_batch_size,
        sampler=None if args.streaming else EpochSampler(pairs.rows, args.seed),
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_stop_signals,
        drop_last=True,
    )


def ignore_stop_signals(worker):
    # Ctrl-C and some schedulers signal the whole process group, of which workers must still serve the step in progress.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def prepare_dataloader(args, accelerator, dataloader):
    """Gives every process its share. A stream's process has its own already."""
    if args.streaming:
        return accelerate.data_loader.prepare_data_loader(
            dataloader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )
    return accelerator.prepare(dataloader)


def remaining_batches(args, accelerator, dataloader, sampler, steps_per_epoch, state):
    """
    Batches from `state["global_step"]` on, which the caller counts, until `--max_train_steps`, epoch by epoch; `sampler`
    is the one within `dataloader`.
    """
    while state["global_step"] < args.max_train_steps:
        start = state["global_step"]
        epoch, steps_done = divmod(start, steps_per_epoch)
        sampler.epoch = epoch
        for batch in accelerator.skip_first_batches(dataloader, steps_done * args.gradient_accumulation_steps):
            yield batch
            if state["global_step"] == args.max_train_steps:
                return
        if state["global_step"] == start:
            raise ValueError("No pair of the dataset can be read: `prepare_preferences.py check` says why.")


def create_policy(args, accelerator, weight_dtype):
    """The frozen U-Net in `weight_dtype` with a LoRA in float32 that does nothing yet."""
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet", revision=args.revision, variant=args.variant
    )
    unet.requires_grad_(False)
    unet.to(accelerator.device, dtype=weight_dtype)
    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha or args.rank,
            init_lora_weights="gaussian",
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
    )
    cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.compile:
        # Each size of block is compiled with its adapter on and off, with gradients and without, in autocast and out of it.
        torch._dynamo.config.recompile_limit = 64
        unet.compile_repeated_blocks()
    return unet


def create_optimizer(args, accelerator, unet):
    """AdamW over the LoRA, with 8-bit states if asked for."""
    if args.use_8bit_adam:
        try:
            import bitsandbytes as bnb
        except ImportError:
            raise ImportError("To use 8-bit Adam, please install bitsandbytes: `pip install bitsandbytes`.")
        optimizer_class = bnb.optim.AdamW8bit
    else:
        optimizer_class = torch.optim.AdamW

    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    return optimizer_class(
        [parameter for parameter in unet.parameters() if parameter.requires_grad],
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def settle_steps(args, dataloader):
    """Sets `--max_train_steps` if only epochs are given, and returns the steps of an epoch. A stream is a single one."""
    if args.streaming:
        return args.max_train_steps
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    return steps_per_epoch


def create_lr_scheduler(args, accelerator, optimizer):
    # accelerate steps it once per process.
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


class Denoising(NamedTuple):
    """What the U-Net is asked for a batch of N images, by the names that [`NoiseConditionedPerception.anchor`] has for it."""

    noisy_latents: torch.Tensor  # (N, C, h, w)
    timesteps: torch.Tensor  # (N,)
    target: torch.Tensor  # (N, C, h, w)
    encoder_hidden_states: torch.Tensor  # (N, L, D)
    added_cond_kwargs: dict | None
    variance_noise: torch.Tensor  # (N, C, h, w)

    def predict(self, unet):
        return unet(
            self.noisy_latents, self.timesteps, self.encoder_hidden_states, added_cond_kwargs=self.added_cond_kwargs
        ).sample

    @torch.no_grad()
    def predict_reference(self, unet):
        with adapters_disabled(unet):
            return self.predict(unet)


def noise_batch(args, batch, components, noise_scheduler):
    """Encodes a batch of pairs and adds each pair's noise at its timestep, to the winner and to the loser."""
    if args.cache_latents:
        latents, prompt = batch["latents"].float(), batch["prompt"]
    else:
        latents = encode_images(components["vae"], batch["pixel_values"], args.vae_encode_batch_size)
        prompt = encode_prompt(components, batch["captions"])
    images_per_pair = len(latents) // len(batch["noise"])
    encoder_hidden_states, added_cond_kwargs = prompt_conditioning(prompt, batch, images_per_pair)
    timesteps = batch["timesteps"].repeat(images_per_pair)
    noise, variance_noise = (batch[name].repeat(images_per_pair, 1, 1, 1) for name in ("noise", "variance_noise"))
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: noise_scheduler.get_velocity(latents, noise, timesteps),
        "sample": lambda: latents,
    }[noise_scheduler.config.prediction_type]()
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    return Denoising(noisy_latents, timesteps, target, encoder_hidden_states, added_cond_kwargs, variance_noise)


def training_step(args, denoising, unet, policy, perception):
    """
    The loss of a batch.

    Args:
        denoising (`Denoising`): of the winners, then, except for sft, of their losers.
        unet (`torch.nn.Module`): the policy as accelerate wrapped it, so that gradients are averaged over processes.
        policy (`UNet2DConditionModel`): the model within, which is the reference and the encoder with its LoRA off.
        perception (`NoiseConditionedPerception` or `None`): `None` measures errors in latent space.

    Returns:
        The loss, and a dictionary of what to log, tensors of one value per pair.
    """
    needs_reference = args.loss_type not in REFERENCE_FREE_LOSS_TYPES
    if perception is None:
        ref_errors = latent_error(denoising.predict_reference(policy), denoising.target) if needs_reference else None
        errors = latent_error(denoising.predict(unet), denoising.target)
    else:
        with perception.record() as recorded:
            ref_pred = denoising.predict_reference(policy) if needs_reference else None
        anchor = perception.anchor(**denoising._asdict(), ref_pred=ref_pred, recorded=recorded)
        ref_errors = anchor.ref_errors
        errors = perception.error(denoising.predict(unet), anchor)

    if args.loss_type == "sft":
        return errors.mean(), {"loss": errors.detach()}
    result = preference_loss(errors, ref_errors, args.loss_type, args.beta_dpo, args.sft_weight, args.label_smoothing)
    margin = result.margin.detach()
    observed = {
        "loss": result.loss.detach().expand_as(margin),
        "implicit_accuracy": result.implicit_accuracy.expand_as(margin),
        "margin": margin,
    }
    observed["error_w"], observed["error_l"] = errors.detach().chunk(2)
    if needs_reference:
        # How far the policy has left the reference: what grows before a run diverges.
        observed["drift_w"], observed["drift_l"] = (errors.detach() - ref_errors).chunk(2)
    return result.loss, observed


def gather_metrics(args, accelerator, observed):
    """Means over the pairs of a step, on all processes, and the numbers of their rows."""
    values = accelerator.gather({name: torch.cat([o[name] for o in observed]) for name in observed[0]})
    rows = values.pop("rows").tolist()
    metrics = {name: value.mean().item() for name, value in values.items()}
    if "margin" in values:
        logits = 0.5 * args.beta_dpo * values["margin"]
        # About 0, where the policy is the reference, so that one pair has a spread too.
        metrics["logit_spread"] = logits.square().mean().sqrt().item()
        metrics["saturated"] = (logits.abs() > 5).float().mean().item()
    return metrics, rows


def is_finite(accelerator, metrics):
    # In fp16 the gradient overflows now and then, which the loss scaler sees to, but for ever is not now and then.
    scaled = accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1
    return math.isfinite(metrics["loss"]) and (math.isfinite(metrics["grad_norm"]) or scaled)


def refuse_step(args, step, skipped_steps, metrics, rows):
    """Says that a step is skipped, or that it is one too many, by a `RuntimeError`."""
    message = f"Step {step} is not finite: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, rows {rows}"
    if skipped_steps > args.max_skipped_steps:
        raise RuntimeError(
            f"{message}. --max_skipped_steps {args.max_skipped_steps} allows no more; checkpoints are intact."
        )
    logger.warning(f"{message}. It is skipped.")


def count_flat_steps(args, metrics, flat_steps):
    """Steps in a row whose logits do not spread; says so at the hundredth."""
    if metrics.get("logit_spread", math.inf) >= 0.01:
        return 0
    if flat_steps == 99:
        logger.warning(
            f"The logits' spread has been below 0.01 for 100 steps: --beta_dpo {args.beta_dpo} does nothing, nothing"
            " holds the policy near the reference. Raise it, or use --ncp_error_scale auto."
        )
    return flat_steps + 1


@contextlib.contextmanager
def perturbed_lora(policy, seed):
    """A small random LoRA in place of the policy's, every layer's update 2 % of its weight."""
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    ups = [layer.lora_B["default"].weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            up = layer.lora_B["default"].weight
            up.copy_(torch.randn(up.shape, generator=generator))
            up *= 0.02 * layer.base_layer.weight.float().norm() / layer.get_delta_weight("default").norm()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, up in zip(layers, ups):
                layer.lora_B["default"].weight.copy_(up)


@torch.no_grad()
def measure_error_scale(args, accelerator, dataloader, policy, components, noise_scheduler, perception):
    """
    The factor that gives margins in feature space the spread they have in latent space, under the same small change of
    the policy. Reference-free losses get the factor of the others, and sft, which reads no losers, takes the change of
    the winners' errors for the margin.
    """
    num_batches = math.ceil(ERROR_SCALE_PAIRS / (args.train_batch_size * accelerator.num_processes))
    first, stride = 0, 1
    if not args.streaming:
        # Every process takes other pairs, all of them as many. A stream's process has its own already.
        first, stride = accelerator.process_index, accelerator.num_processes
        num_batches = min(num_batches, len(dataloader) // stride)
    batches = itertools.islice(dataloader, first, num_batches * stride, stride)
    margins = {"latent": [], "ncp": []}
    with perturbed_lora(policy, args.seed):
        for batch in tqdm(
            batches, desc="Error scale", total=num_batches, disable=not accelerator.is_local_main_process
        ):
            batch = send_to_device(batch, accelerator.device)
            denoising = noise_batch(args, batch, components, noise_scheduler)
            ref_pred, model_pred = denoising.predict_reference(policy), denoising.predict(policy)
            anchor = perception.anchor(**denoising._asdict(), ref_pred=ref_pred)
            for space, errors, ref_errors in [
                ("latent", latent_error(model_pred, denoising.target), latent_error(ref_pred, denoising.target)),
                ("ncp", perception.error(model_pred, anchor), anchor.ref_errors),
            ]:
                change = ref_errors - errors
                margins[space].append(change if args.loss_type == "sft" else torch.sub(*change.chunk(2)))
    spread = {space: accelerator.gather(torch.cat(values)).std().item() for space, values in margins.items()}
    if not (spread["latent"] > 0 and spread["ncp"] > 0):
        raise RuntimeError(
            f"The margins' spread is {spread['latent']} in latent space and {spread['ncp']} in feature space, of which no"
            " error scale follows. Give --ncp_error_scale, or more than one pair."
        )
    # So few digits that the flag that is printed gives the very same run.
    return float(f"{spread['latent'] / spread['ncp']:.4g}")


def create_perception(args, accelerator, dataloader, policy, components, noise_scheduler, state):
    """What errors are measured with, its scale given, resumed from `state` or measured now; `None` for latent space."""
    if args.loss_space == "latent":
        return None
    perception = NoiseConditionedPerception(
        policy, noise_scheduler, args.ncp_layer, args.ncp_timestep, args.ncp_probe_rms
    )
    if args.ncp_error_scale != "auto":
        state["error_scale"] = args.ncp_error_scale
    elif state["error_scale"] is None:
        state["error_scale"] = measure_error_scale(
            args, accelerator, dataloader, policy, components, noise_scheduler, perception
        )
    perception.error_scale = state["error_scale"]
    logger.info(f"Perceptual errors are scaled by --ncp_error_scale {perception.error_scale}")
    return perception


def register_checkpoint_hooks(accelerator, policy, state):
    """Checkpoints hold the LoRA in diffusers' format and `state` as JSON, and load into the very adapter that trains."""

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            save_lora(policy, output_dir)
            (Path(output_dir) / STATE_NAME).write_text(json.dumps(state, indent=2))
        # Or else accelerate would save the whole U-Net as well.
        weights.clear()

    def load(models, input_dir):
        models.clear()
        lora = PIPELINE_CLASS.lora_state_dict(input_dir)[0]
        lora = {name.removeprefix("unet."): value for name, value in lora.items()}
        result = set_peft_model_state_dict(policy, convert_unet_state_dict_to_peft(lora), adapter_name="default")
        missing = [name for name in result.missing_keys if "lora" in name]
        if missing or result.unexpected_keys:
            raise ValueError(f"The LoRA in {input_dir} does not fit: {missing + result.unexpected_keys}.")
        saved = json.loads((Path(input_dir) / STATE_NAME).read_text())
        state["global_step"] = saved["global_step"]
        if all(saved["arguments"][name] == state["arguments"][name] for name in ERROR_ARGUMENTS):
            state["error_scale"] = saved["error_scale"]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_lora(policy, folder):
    PIPELINE_CLASS.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(policy)),
        **_collate_lora_metadata({"unet": policy}),
    )


def find_checkpoints(output_dir):
    """Complete checkpoints in ascending order of their steps."""
    folders = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE_NAME}")]
    return sorted(folders, key=lambda folder: int(folder.name.split("-")[1]))


def save_checkpoint(args, accelerator, global_step):
    """
    Writes `checkpoint-N`, which appears under that name only when all of it is on the disk, then removes those over the
    limit.
    """
    folder = Path(args.output_dir) / f"checkpoint-{global_step}"
    incomplete = folder.with_name(f"incomplete-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(incomplete, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(incomplete))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for path in [*incomplete.rglob("*"), incomplete]:
                synchronize(path)
            incomplete.rename(folder)
            synchronize(folder.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise RuntimeError(
            f"{folder} could not be saved: {error}. Whole checkpoints:"
            f" {', '.join(path.name for path in find_checkpoints(args.output_dir)) or 'none'}. Make room, or go on with"
            " --resume_from_checkpoint and another --output_dir."
        ) from error
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        for old in find_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
            shutil.rmtree(old)
    logger.info(f"Saved {folder}")


def synchronize(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def find_checkpoint_to_resume(args):
    """The folder that `--resume_from_checkpoint` means, or `None` for a new run."""
    checkpoints = find_checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None:
        if checkpoints:
            raise ValueError(
                f"--output_dir {args.output_dir} holds {checkpoints[-1].name} of another run. Give another folder, or"
                " continue that run by --resume_from_checkpoint latest."
            )
        return None
    if args.resume_from_checkpoint == "latest":
        for path in set(Path(args.output_dir).glob("*checkpoint-*")) - set(checkpoints):
            logger.warning(f"{path} is passed over: it was not completed")
        if not checkpoints:
            logger.info(f"There is no checkpoint in {args.output_dir} yet: starting anew")
            return None
        return checkpoints[-1]
    named = [Path(args.resume_from_checkpoint), Path(args.output_dir, args.resume_from_checkpoint)]
    found = [folder for folder in named if (folder / STATE_NAME).is_file()]
    if not found:
        raise ValueError(f"--resume_from_checkpoint: there is no checkpoint {named[0]}, nor {named[1]}.")
    global_step = json.loads((found[0] / STATE_NAME).read_text())["global_step"]
    later = [folder.name for folder in checkpoints if int(folder.name.split("-")[1]) > global_step]
    if later:
        raise ValueError(
            f"--output_dir {args.output_dir} holds {', '.join(later)}, which a run from {found[0]} would meet. Remove what"
            " is not wanted, or give another folder."
        )
    return found[0]


def check_resume(args, accelerator, checkpoint):
    """Takes over the checkpoint's seed if none is given; a `ValueError` for what would silently change the run."""
    state = json.loads((checkpoint / STATE_NAME).read_text())
    saved = state["arguments"]
    if accelerator.num_processes != state["num_processes"]:
        # Nor could --allow_resume_changes help: steps of the learning rate's schedule are counted once per process.
        raise ValueError(
            f"{checkpoint} is of {state['num_processes']} processes, not {accelerator.num_processes}: give accelerate"
            f" launch --num_processes {state['num_processes']}."
        )
    if args.seed is None:
        args.seed = saved["seed"]
    if args.ncp_error_scale in ("auto", state["error_scale"]):
        saved["ncp_error_scale"] = args.ncp_error_scale
    free = FREE_ARGUMENTS
    if not args.lr_scheduler.startswith("constant"):
        # The learning rate falls towards the last step.
        free = free - {"max_train_steps", "num_train_epochs"}
    changes = [
        f"--{name} is {value!r}, but was {saved[name]!r}"
        for name, value in vars(args).items()
        if name not in free and value != saved[name]
    ]
    if changes and not args.allow_resume_changes:
        raise ValueError(
            f"{'; '.join(changes)} in {checkpoint}. Give what it was, or --allow_resume_changes if you mean it."
        )
    for change in changes:
        logger.warning(f"{change} in {checkpoint}")


def note_stop_signals():
    """A list to which SIGTERM and SIGINT add their number, the first of each: a second one stops at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received


def stop(args, accelerator, stop_signals):
    """Ends a run that was told to stop, its checkpoint saved, with the command that goes on."""
    accelerator.end_training()
    number = stop_signals[0] if stop_signals else signal.SIGTERM
    words = [word for word in sys.argv if not word.startswith("--resume_from_checkpoint")]
    if args.resume_from_checkpoint in words:
        words.remove(args.resume_from_checkpoint)
    logger.info(
        f"Stopped by {signal.Signals(number).name}. To go on:\n"
        f"accelerate launch --num_processes {accelerator.num_processes} {shlex.join(words)} --resume_from_checkpoint latest"
    )
    sys.exit(128 + number)


def finish(args, accelerator, policy, components, weight_dtype, state):
    """Saves the LoRA, draws the last validation images and writes and uploads the model card."""
    if accelerator.is_main_process:
        save_lora(policy, args.output_dir)
        if args.run_validation:
            log_validation(args, accelerator, policy, components, weight_dtype, state["global_step"])
            folder = Path(args.output_dir) / "validation"
            before, after = (Image.open(folder / f"step-{step}.png") for step in (0, state["global_step"]))
            make_image_grid([before, after], rows=2, cols=1).save(folder / "before_after.png")
        save_model_card(args, accelerator.num_processes, state["error_scale"])
        if args.push_to_hub:
            upload_folder(
                repo_id=args.hub_model_id,
                folder_path=args.output_dir,
                commit_message="End of training",
                ignore_patterns=["checkpoint-*", "incomplete-checkpoint-*"],
                token=args.hub_token,
            )
    accelerator.end_training()


def main(args):
    accelerator = create_accelerator(args)
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    checkpoint = find_checkpoint_to_resume(args)
    if checkpoint is not None:
        check_resume(args, accelerator, checkpoint)
    settle_seed(args)
    noise_scheduler, latent_shape = load_configurations(args)
    pairs = open_pairs(args, accelerator, latent_shape, noise_scheduler.config.num_train_timesteps)

    components = load_components(args, accelerator, weight_dtype)
    if args.cache_latents:
        pairs = cache_pairs(args, accelerator, pairs, components, weight_dtype)
        components.clear()
    policy = create_policy(args, accelerator, weight_dtype)
    optimizer = create_optimizer(args, accelerator, policy)
    dataloader = create_dataloader(args, pairs)
    train_dataloader = prepare_dataloader(args, accelerator, dataloader)
    steps_per_epoch = settle_steps(args, train_dataloader)
    lr_scheduler = create_lr_scheduler(args, accelerator, optimizer)
    # `unet` is what gradients are averaged through; `policy`, the model in it, is the reference and the encoder as well.
    unet, optimizer, lr_scheduler = accelerator.prepare(policy, optimizer, lr_scheduler)

    settings = {name: value for name, value in vars(args).items() if name != "hub_token"}
    state = {
        "global_step": 0,
        "error_scale": None,
        "num_processes": accelerator.num_processes,
        "arguments": settings,
    }
    register_checkpoint_hooks(accelerator, policy, state)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        logger.info(f"Resumed from {checkpoint}")
    perception = create_perception(args, accelerator, dataloader, policy, components, noise_scheduler, state)
    accelerator.init_trackers(args.tracker_name, {**settings, "ncp_error_scale": state["error_scale"]})
    if args.run_validation and accelerator.is_main_process:
        # Of a resumed run as well, which may have another folder or prompt.
        with adapters_disabled(policy):
            log_validation(args, accelerator, policy, components, weight_dtype, 0)

    logger.info(f"Training for {args.max_train_steps} steps, {steps_per_epoch} per epoch")
    progress_bar = tqdm(
        total=args.max_train_steps,
        initial=state["global_step"],
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    unet.train()
    stop_signals = note_stop_signals()
    observed, flat_steps, skipped_steps, num_skipped, num_ties, stops = [], 0, 0, 0, 0, False
    for batch in remaining_batches(args, accelerator, train_dataloader, dataloader.sampler, steps_per_epoch, state):
        for reason in batch["skipped"]:
            logger.warning(f"{reason}. The next pair takes its place.", main_process_only=False)
        num_skipped += len(batch["skipped"])
        num_ties += batch["ties"]
        with accelerator.accumulate(unet):
            denoising = noise_batch(args, batch, components, noise_scheduler)
            loss, observed_in_batch = training_step(args, denoising, unet, policy, perception)
            observed.append({**observed_in_batch, "rows": batch["rows"]})
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                metrics, rows = gather_metrics(args, accelerator, observed)
                observed.clear()
                metrics["grad_norm"] = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
                skipped_steps = 0 if is_finite(accelerator, metrics) else skipped_steps + 1
                if skipped_steps > 0:
                    refuse_step(args, state["global_step"] + 1, skipped_steps, metrics, rows)
                    optimizer.zero_grad()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        state["global_step"] += 1
        flat_steps = count_flat_steps(args, metrics, flat_steps)
        progress_bar.update()
        progress_bar.set_postfix({name: f"{metrics[name]:.4g}" for name in PROGRESS_METRICS if name in metrics})
        accelerator.log({**metrics, "lr": lr_scheduler.get_last_lr()[0]}, step=state["global_step"])
        # The signal may not have reached every process.
        stops = accelerator.reduce(torch.tensor(sum(stop_signals), device=accelerator.device)).item() > 0
        if state["global_step"] % args.checkpointing_steps == 0 or stops:
            save_checkpoint(args, accelerator, state["global_step"])
        if stops:
            break
        if args.run_validation and state["global_step"] % args.validation_steps == 0 and accelerator.is_main_process:
            log_validation(args, accelerator, policy, components, weight_dtype, state["global_step"])

    accelerator.wait_for_everyone()
    # A wrapped model that outlives its process group destroys it with Python's lock held, which gloo's threads may want.
    unet, optimizer, lr_scheduler = accelerator.free_memory(unet, optimizer, lr_scheduler)
    if num_skipped or num_ties:
        logger.info(f"{num_skipped} unreadable pairs were skipped, {num_ties} ties left out", main_process_only=False)
    if stops:
        stop(args, accelerator, stop_signals)
    finish(args, accelerator, policy, components, weight_dtype, state)


if __name__ == "__main__":
    main(parse_args())
