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

"""Trains a LoRA for SDXL on preference pairs, by DPO, IPO, hinge, CPO or SFT, in the feature space of the frozen U-Net's
encoder (Noise-Conditioned Perception, arXiv:2406.17636) or in latent space.

    accelerate launch train_ncp_dpo_sdxl.py \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dataset_name kashif/pickascore \
      --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --dataset_split_name validation \
      --mixed_precision bf16 --rank 64 --use_8bit_adam --gradient_checkpointing --train_batch_size 1 \
      --gradient_accumulation_steps 4 --learning_rate 1e-5 --max_train_steps 1000 --output_dir ncp-dpo-sdxl

The U-Net with its LoRA is the policy; the same U-Net with the LoRA switched off is both the reference model and the
perceptual encoder. What a pair sees (timestep, noise, flip, crop) depends on the seed, the epoch and its row alone.
"""

import argparse
import bisect
import contextlib
import errno
import functools
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
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from huggingface_hub import ModelCard, ModelCardData, create_repo, list_repo_files, upload_folder
from huggingface_hub.errors import OfflineModeIsEnabled
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
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import (
    check_min_version,
    convert_state_dict_to_diffusers,
    convert_unet_state_dict_to_peft,
    is_wandb_available,
    make_image_grid,
)
from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH, populate_model_card


if is_wandb_available():
    import wandb

# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.35.0")

logger = get_logger(__name__)

PIPELINE_CLASS = StableDiffusionXLPipeline
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
DEFAULTS = {"output_dir": "ncp-dpo-sdxl-lora", "tracker_name": "ncp-dpo-sdxl-lora", "resolution": 1024}
# What a U-Net adds to its time embedding tells SDXL's from the others'.
ADDITION_EMBED_TYPE = "text_time"

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
STATE_NAME = "training_state.json"
COLUMN_FLAGS = ("image_0_column", "image_1_column", "label_column", "caption_column")
# What a resumed run must have in common with its checkpoint, beside the data.
LEARNING_ARGUMENTS = """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant rank lora_alpha mixed_precision
    image_0_column image_1_column label_column resolution random_crop no_hflip image_interpolation_mode seed
    loss_type loss_space beta_dpo sft_weight label_smoothing ncp_layer ncp_timestep ncp_probe_rms ncp_error_scale
    train_batch_size gradient_accumulation_steps learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power
    use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
""".split()
# What an error scale is measured for.
ERROR_ARGUMENTS = ("loss_space", "ncp_layer", "ncp_timestep", "ncp_probe_rms")
# What encoded data was encoded by.
ENCODING_ARGUMENTS = ("resolution", "image_interpolation_mode", *COLUMN_FLAGS)
ERROR_SCALE_PAIRS = 64
# Less the one whose steps there is no flag for.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
PROGRESS_METRICS = ("loss", "implicit_accuracy", "margin")


# Reports


# Copied from train_ncp_dpo_sd15.save_model_card
def save_model_card(args, num_processes, error_scale):
    """Writes `README.md`: what the LoRA was trained on and how, validation images, how to load it."""
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
    # Nobody else has what lies in a folder of this machine.
    is_local = os.path.exists(args.pretrained_model_name_or_path)
    base_model = Path(args.pretrained_model_name_or_path).name if is_local else args.pretrained_model_name_or_path
    data = Path(args.dataset_name or args.train_data_dir or args.encoded_data_dir)
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    pictures = ""
    if args.run_validation:
        pictures = (
            f"\nBefore (top) and after (bottom), from the same noise: *{args.validation_prompt}*\n\n"
            "![before and after](validation/before_after.png)\n"
        )
    model_card = ModelCard.from_template(
        card_data=ModelCardData(
            library_name="diffusers", base_model=None if is_local else base_model, pipeline_tag="text-to-image"
        ),
        template_path=MODEL_CARD_TEMPLATE_PATH,
        model_description=f"""# {repo_id}

A LoRA for `{base_model}`, trained on the preference pairs of `{data.name if data.exists() else data.as_posix()}` with
[Noise-Conditioned Perception](https://huggingface.co/papers/2406.17636).
{pictures}
| setting | value |
|---|---|
{table}

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base_model}", torch_dtype=torch.float16)
pipeline.to("cuda").load_lora_weights("{repo_id}")
image = pipeline({json.dumps(args.validation_prompt or "a photo of an astronaut")}).images[0]
```
""",
    )
    tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "ncp-dpo"]
    populate_model_card(model_card, tags=tags).save(Path(args.output_dir) / "README.md")


# Copied from train_ncp_dpo_sd15.log_validation
def log_validation(args, accelerator, policy, components, weight_dtype, global_step):
    """
    With `--run_validation`, draws `num_validation_images` images of `validation_prompt` into `validation/step-N.png` and the trackers, and below those
    of step 0, the base model's, into `validation/before_after.png`. Their noise is the same at every step.
    """
    if not (args.run_validation and accelerator.is_main_process):
        return
    logger.info(f"Drawing {args.num_validation_images} validation images at step {global_step}")
    pipeline = PIPELINE_CLASS.from_pretrained(
        args.pretrained_model_name_or_path,
        unet=policy,
        revision=args.revision,
        torch_dtype=weight_dtype,
        **components,
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
    before_after = [Image.open(folder / f"step-{step}.png") for step in (0, global_step)]
    make_image_grid(before_after, rows=2, cols=1).save(folder / "before_after.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            batch = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images("validation", batch, global_step, dataformats="NHWC")
        elif tracker.name == "wandb":
            pictures = [wandb.Image(image, caption=args.validation_prompt) for image in images]
            tracker.log({"validation": pictures}, step=global_step)


# Arguments


# Copied from train_ncp_dpo_sd15.number
def number(kind, rule, accepts):
    """An argument type: an `int` or `float` that `accepts`, which `rule` says in words."""

    def convert(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}, but must be {rule}")
        return value

    convert.__name__ = kind.__name__
    return convert


COUNT = number(int, "at least 1", lambda value: value >= 1)
POSITIVE = number(float, "greater than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = number(float, "at least 0", lambda value: 0 <= value < math.inf)
SEED = number(int, "within 0 and 2**32 - 1", lambda value: 0 <= value < 2**32)


# Copied from train_ncp_dpo_sd15.auto_or_positive
def auto_or_positive(text):
    return text if text == "auto" else POSITIVE(text)


# Copied from train_ncp_dpo_sd15.add_model_arguments
def add_model_arguments(parser):
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base model.")
    model.add_argument("--revision", help="Revision of the base model on the hub.")
    model.add_argument("--variant", help="Variant of the model files, e.g. fp16.")
    model.add_argument(
        "--pretrained_vae_model_name_or_path", help="Hub id or folder of a VAE in place of the base model's."
    )


# Copied from train_ncp_dpo_sd15.add_data_arguments
def add_data_arguments(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id, or a local folder of parquet files, of preference pairs.")
    data.add_argument("--dataset_config_name", help="Configuration of the dataset.")
    data.add_argument("--dataset_split_name", default="train", help="Split of the dataset.")
    data.add_argument(
        "--train_data_dir",
        help=(
            "Folder of images with a metadata.jsonl whose rows give jpg_0_file_name, jpg_1_file_name, label_0 and caption"
            " (or what the column flags say instead)."
        ),
    )
    data.add_argument("--image_0_column", default="jpg_0", help="Column of the first image, bytes or image.")
    data.add_argument("--image_1_column", default="jpg_1", help="Column of the second image.")
    data.add_argument(
        "--label_column",
        default="label_0",
        help="Column that says who won: 1 the first image, 0 the second, 0.5 neither (a tie, which is left out).",
    )
    data.add_argument("--caption_column", default="caption", help="Column of the prompt.")
    data.add_argument("--max_train_samples", type=COUNT, help="Use the first so many pairs with a winner only.")
    data.add_argument(
        "--on_bad_sample",
        choices=["error", "skip"],
        default="error",
        help="What to do about a pair that cannot be read: stop, or go on without it and say so.",
    )
    data.add_argument("--cache_dir", help="Where downloaded datasets are stored.")
    data.add_argument("--resolution", type=COUNT, help="Side of the square that images are cropped to.")
    data.add_argument("--no_hflip", action="store_true", help="Do not flip half of the pairs horizontally.")
    data.add_argument(
        "--image_interpolation_mode",
        choices=[mode.name.lower() for mode in Image.Resampling],
        default="lanczos",
        help="How images are resized.",
    )
    data.add_argument("--vae_encode_batch_size", type=COUNT, default=8, help="Images or captions to encode at once.")


# Copied from train_ncp_dpo_sd15.add_training_arguments
def add_training_arguments(parser):
    data = parser.add_argument_group("training data")
    data.add_argument(
        "--encoded_data_dir",
        help="What tools/encode_preferences.py wrote, instead of a dataset or a folder of images.",
    )
    data.add_argument("--random_crop", action="store_true", help="Crop at random instead of the centre.")
    data.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that load images; 0 is the main one."
    )

    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss_type", choices=LOSS_TYPES, default="dpo", help="What is minimised.")
    loss.add_argument(
        "--loss_space",
        choices=["ncp", "latent"],
        default="ncp",
        help="Where errors are measured: in the frozen U-Net's features (ncp) or in latent space (latent).",
    )
    loss.add_argument(
        "--beta_dpo",
        type=POSITIVE,
        default=5000,
        help="Beta, the weight of the KL divergence from the reference, in the loss as beta / 2.",
    )
    loss.add_argument("--sft_weight", type=NOT_NEGATIVE, default=1.0, help="Weight of the winner's error in cpo.")
    loss.add_argument(
        "--label_smoothing",
        type=number(float, "in [0, 0.5)", lambda value: 0 <= value < 0.5),
        default=0.0,
        help="Share of labels taken to be wrong (dpo and cpo).",
    )
    loss.add_argument("--ncp_layer", choices=LAYERS, default="mid", help="Block whose features count.")
    loss.add_argument(
        "--ncp_timestep",
        choices=TARGET_TIMESTEPS,
        default="previous",
        help="Timestep that the features see, relative to the prediction's.",
    )
    loss.add_argument(
        "--ncp_probe_rms",
        type=NOT_NEGATIVE,
        help=(
            "Size to which steps in latent space are enlarged so that half precision resolves them; 0 is the literal"
            " formula. Default: by precision."
        ),
    )
    loss.add_argument(
        "--ncp_error_scale",
        type=auto_or_positive,
        default="auto",
        help=(
            "Factor that brings perceptual errors to the size of latent ones, so that beta, the weights and the learning"
            " rate mean the same in both spaces. `auto` measures it before training; 1 is the paper as written."
        ),
    )

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", help="Where everything is written.")
    training.add_argument("--seed", type=SEED, help="Default: a random one, which is printed.")
    training.add_argument("--rank", type=COUNT, default=4, help="Rank of the LoRA. The paper uses 64.")
    training.add_argument("--lora_alpha", type=COUNT, help="Scale of the LoRA times its rank. Default: the rank.")
    training.add_argument("--train_batch_size", type=COUNT, default=4, help="Pairs per process and step.")
    training.add_argument("--num_train_epochs", type=COUNT, default=1, help="Ignored if --max_train_steps is given.")
    training.add_argument("--max_train_steps", type=COUNT, help="Optimization steps in total.")
    training.add_argument(
        "--gradient_accumulation_steps", type=COUNT, default=1, help="Batches per optimization step."
    )
    training.add_argument(
        "--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, more time."
    )
    training.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Precision of all but the LoRA's weights. Default: accelerate's configuration.",
    )
    training.add_argument(
        "--compile", action="store_true", help="Compile the U-Net's transformer blocks; the first steps take minutes."
    )
    training.add_argument(
        "--channels_last", action="store_true", help="Keep the U-Net's convolutions in the channels-last format."
    )
    training.add_argument("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs use TF32 in fp32.")
    training.add_argument("--learning_rate", type=NOT_NEGATIVE, default=5e-4)
    training.add_argument(
        "--scale_lr", action="store_true", help="Multiply the learning rate by processes, accumulation and batch size."
    )
    training.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant")
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
    checkpoints.add_argument("--checkpointing_steps", type=COUNT, default=500, help="Steps between checkpoints.")
    checkpoints.add_argument("--checkpoints_total_limit", type=COUNT, help="Checkpoints to keep.")
    checkpoints.add_argument(
        "--resume_from_checkpoint", help="A checkpoint's folder, its name in --output_dir, or `latest`."
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
    reports.add_argument("--report_to", choices=["none", *map(str, LoggerType)], default="tensorboard")
    reports.add_argument("--tracker_name", help="Name of the project in the tracker.")
    reports.add_argument("--logging_dir", default="logs", help="Folder within --output_dir for the tracker.")
    reports.add_argument("--run_validation", action="store_true", help="Draw images before, while and after training.")
    reports.add_argument("--validation_prompt", help="What to draw.")
    reports.add_argument("--num_validation_images", type=COUNT, default=4)
    reports.add_argument("--validation_steps", type=COUNT, default=200, help="Steps between validations.")
    reports.add_argument("--push_to_hub", action="store_true", help="Upload the LoRA, its card, pictures and logs.")
    reports.add_argument("--hub_token", help="Default: that of `hf auth login`.")
    reports.add_argument("--hub_model_id", help="Default: the name of --output_dir.")
    reports.add_argument("--hub_private_repo", action="store_true", help="Create the repository as a private one.")


# Copied from train_ncp_dpo_sd15.check_arguments
def check_arguments(args):
    """Raises a `ValueError` that names the flags which do not go together."""
    sources = [args.dataset_name, args.train_data_dir, args.encoded_data_dir]
    if sum(source is not None for source in sources) != 1:
        raise ValueError("Give exactly one of --dataset_name, --train_data_dir and --encoded_data_dir.")
    if args.encoded_data_dir is not None and args.random_crop:
        raise ValueError("--encoded_data_dir holds one crop of every image: --random_crop does not go with it.")
    if args.label_smoothing and args.loss_type not in ("dpo", "cpo"):
        raise ValueError(f"--label_smoothing goes with --loss_type dpo or cpo, not {args.loss_type}.")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; bf16 does without.")
    if args.run_validation and args.validation_prompt is None:
        raise ValueError("--run_validation needs a --validation_prompt.")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise ValueError("--hub_token would show up in wandb's logs. Use `hf auth login` instead.")
    if args.report_to not in ("none", "all", *map(str, get_available_trackers())):
        raise ImportError(f"To report to {args.report_to}, please install it: `pip install {args.report_to}`.")


# Copied from train_ncp_dpo_sd15.create_parser
def create_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(**DEFAULTS)
    return parser


# Copied from train_ncp_dpo_sd15.parse_args
def parse_args(input_args=None):
    args = create_parser().parse_args(input_args)
    check_arguments(args)
    return args


# Pairs: from a dataset's row to images


# Copied from train_ncp_dpo_sd15.load_dataset
def load_dataset(args):
    """
    Opens `--dataset_name` or `--train_data_dir`: the four columns that training reads, images still encoded. Everything that
    reads preference pairs reads them by this function, so that they all say the same.

    Returns:
        `datasets.Dataset`: images as `{"bytes", "path"}`, label (a float or `None`) and caption (a text or `None`).

    Raises:
        `ValueError`: names the flag, column, file or line that is wrong.
    """
    if args.train_data_dir is not None:
        return load_image_folder(args)
    name, split = args.dataset_name, args.dataset_split_name
    if Path(name).is_file():
        raise ValueError(f"--dataset_name {name} is a file: give the folder that it is in.")
    if Path(name, "state.json").is_file():
        raise ValueError(f"--dataset_name {name} was written by save_to_disk: write it by to_parquet instead.")
    try:
        builder = datasets.load_dataset_builder(name, args.dataset_config_name, cache_dir=args.cache_dir)
        data_files = builder.config.data_files or {}
        if data_files and split.isidentifier() and split not in data_files:
            raise ValueError(f"its splits (--dataset_split_name) are {', '.join(map(str, data_files))}, not {split}")
        files = data_files.get(split, [])
        local_files = [file for file in files if "://" not in file]
        options = {}
        if files and all(file.endswith(".parquet") for file in files):
            for file in local_files:
                check_columns(args, read_parquet_schema(file), file)
            # Given here, the types of all files are these, and no other column is read.
            options = {"features": pair_features(args), "columns": list(pair_features(args))}
        dataset = datasets.load_dataset(
            name, args.dataset_config_name, split=split, cache_dir=args.cache_dir, **options
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        where = next((f"{file}: " for file in local_files if not is_readable(file)), "") if cause is not error else ""
        raise ValueError(f"--dataset_name {name} cannot be read: {where}{one_line(cause)}") from error
    check_columns(args, dataset.features.arrow_schema, f"--dataset_name {name}")
    return dataset.select_columns(list(pair_features(args))).cast(pair_features(args))


# Copied from train_ncp_dpo_sd15.pair_features
def pair_features(args):
    image = datasets.Image(decode=False)
    label, caption = datasets.Value("float64"), datasets.Value("string")
    return datasets.Features(dict(zip((getattr(args, flag) for flag in COLUMN_FLAGS), (image, image, label, caption))))


# Copied from train_ncp_dpo_sd15.one_line
def one_line(text, length=200):
    """A text of somebody else's, cut for a message."""
    return " ".join(str(text).split())[:length]


# Copied from train_ncp_dpo_sd15.read_parquet_schema
def read_parquet_schema(file):
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {error}") from error


# Copied from train_ncp_dpo_sd15.is_readable
def is_readable(parquet_file):
    try:
        for _ in pq.ParquetFile(parquet_file).iter_batches():
            pass
    except (OSError, pa.ArrowException):
        return False
    return True


# Copied from train_ncp_dpo_sd15.check_columns
def check_columns(args, schema, where):
    """A `ValueError` if one of the four columns is not there or of a type that cannot be what it should."""
    for flag in COLUMN_FLAGS:
        column = getattr(args, flag)
        if column not in schema.names:
            raise ValueError(
                f"{where} has no column {column!r} (--{flag}): its columns are {one_line(', '.join(schema.names))}."
            )
        kind = schema.field(column).type
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        if flag == "caption_column":
            wanted, fits = "text", [pa.types.is_string, pa.types.is_large_string]
        elif flag == "label_column":
            wanted, fits = "numbers", [pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal]
        else:
            wanted = "images, encoded"
            fits = [pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_struct]
        if not any(fit(kind) for fit in [pa.types.is_null, *fits]):
            raise ValueError(f"{where}: {column} (--{flag}) is of type {one_line(kind)}, but must be {wanted}.")


# Copied from train_ncp_dpo_sd15.load_image_folder
def load_image_folder(args):
    """The same of a folder with a metadata.jsonl, read line by line: no type is guessed from the lines before."""
    path = Path(args.train_data_dir, "metadata.jsonl")
    if not path.is_file():
        raise ValueError(f"--train_data_dir: there is no file {path}.")
    keys = {flag: getattr(args, flag) + ("_file_name" if "image" in flag else "") for flag in COLUMN_FLAGS}
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            raise ValueError(f"{where} is not JSON in UTF-8: {error}") from error
        for flag, key in keys.items():
            if not isinstance(row, dict) or key not in row:
                raise ValueError(f"{where} has no {key!r} (--{flag}), but {one_line(', '.join(map(repr, row)))}.")
            wanted, types = ("a number", (int, float)) if flag == "label_column" else ("a text", str)
            if row[key] is not None and not isinstance(row[key], types):
                raise ValueError(f"{where}: {key} is {one_line(repr(row[key]), 80)}, but must be {wanted}.")
        rows.append([row[key] for key in keys.values()])
    columns = map(list, zip(*rows)) if rows else [[]] * len(keys)
    features = pair_features(args)
    return datasets.Dataset.from_dict(dict(zip(features, columns)), features=features)


# Copied from train_ncp_dpo_sd15.find_rows
def find_rows(args, dataset):
    """The numbers of the rows with a winner; a `ValueError` that names the first row that cannot be trained on."""
    labels, captions = (dataset.data.column(name).to_pylist() for name in (args.label_column, args.caption_column))
    for row, (label, caption) in enumerate(zip(labels, captions)):
        problem = label_problem(label) or caption_problem(caption)
        if problem is not None:
            raise ValueError(f"Row {row}: {problem}.")
    rows = [row for row, label in enumerate(labels) if label != 0.5]
    logger.info(f"{len(rows)} pairs with a winner; {len(labels) - len(rows)} ties are left out")
    if not rows:
        raise ValueError(
            f"No pair is left: {args.dataset_name or args.train_data_dir} has {len(labels)} rows, all ties."
        )
    return rows[: args.max_train_samples]


# Copied from train_ncp_dpo_sd15.label_problem
def label_problem(label):
    return None if label in (0, 0.5, 1) else f"the label is {label}, but must be 1, 0, or 0.5 for a tie"


# Copied from train_ncp_dpo_sd15.caption_problem
def caption_problem(caption):
    return None if isinstance(caption, str) else "the caption is null, but must be a text"


# Copied from train_ncp_dpo_sd15.digest_of_pairs
def digest_of_pairs(rows, labels, captions):
    """What a resumed run recognises its data by, as images or encoded."""
    pairs = json.dumps([rows, labels, captions])
    return {"num_pairs": len(rows), "digest": hashlib.sha256(pairs.encode()).hexdigest()}


# Copied from train_ncp_dpo_sd15.EpochSampler
class EpochSampler(torch.utils.data.Sampler):
    """Every row once per epoch in an order that only the seed and the epoch decide, as `(epoch, row)`, from `start` on."""

    def __init__(self, rows, seed):
        self.rows = rows
        self.seed = seed
        # Not by `set_epoch`, which some versions of accelerate call with numbers of their own.
        self.epoch, self.start = 0, 0

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows))
        for index in order[self.start :]:
            yield self.epoch, self.rows[index]


# Copied from train_ncp_dpo_sd15.UnreadableImage
class UnreadableImage(ValueError):
    """Names the row, its caption, the column and what is wrong with the image."""


# Copied from train_ncp_dpo_sd15.PreferencePairs
class PreferencePairs(torch.utils.data.Dataset):
    """
    Pairs as training sees them in an epoch: `pairs[epoch, row]`.

    Args:
        dataset (`datasets.Dataset`): what `load_dataset` returns.
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
                return {**self.example(epoch, row, identity), "skipped": skipped}
            except UnreadableImage as error:
                skipped.append(str(error))
                if self.args.on_bad_sample == "error" or len(skipped) == len(self.rows):
                    raise
            row = self.rows[bisect.bisect(self.rows, row) % len(self.rows)]

    def example(self, epoch, row, identity):
        # Randomness belongs to the pair (a substitute has that of the one it stands for), so that neither processes nor
        # workers nor a resume can change it.
        seed = np.random.SeedSequence([self.args.seed, epoch, identity]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        crop_position = torch.rand(2, generator=generator).tolist() if self.args.random_crop else (0.5, 0.5)
        flip = bool(torch.rand((), generator=generator) < 0.5) and not self.args.no_hflip
        timestep = torch.randint(self.num_train_timesteps, (), generator=generator)
        noise, variance_noise = torch.randn(2, *self.latent_shape, generator=generator)
        return {
            **self.read(row, crop_position, flip),
            "timesteps": timestep,
            "noise": noise,
            "variance_noise": variance_noise,
            "rows": torch.tensor(row),
        }

    def read(self, row, crop_position, flip):
        """The winner and, except for sft, the loser, as `images`, and the `caption`."""
        values = self.dataset[row]
        images = [
            preprocess_image(image, self.args, crop_position, flip)
            for image in read_images(self.args, row, values, winner_only=self.args.loss_type == "sft")
        ]
        return {"images": images, "caption": values[self.args.caption_column]}

    def digest(self):
        """See `digest_of_pairs`."""
        chosen = self.dataset.select(self.rows)
        return digest_of_pairs(self.rows, chosen[self.args.label_column][:], chosen[self.args.caption_column][:])


# Copied from train_ncp_dpo_sd15.read_images
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
            caption = values[args.caption_column]
            raise UnreadableImage(
                f"Row {row} ({caption!r:.80}): {column} cannot be read as an image: {one_line(error)}"
            ) from error
    return images


# Copied from train_ncp_dpo_sd15.locate_image
def locate_image(args, value):
    """
    The encoded image of a dataset's `{"bytes", "path"}`, or its path, which must lie in the folder of the data, or in the
    cache if that is none: a dataset of somebody else's must not read other files.
    """
    if value is None or value["bytes"] is value["path"] is None:
        raise ValueError("null instead of an image")
    if value["bytes"] is not None:
        return value["bytes"]
    if len(value["path"]) > 1000:
        raise ValueError(f"{value['path'][:20]!r}... is text instead of an image; base64 has to be decoded")
    name = args.train_data_dir or args.dataset_name
    folder = Path(name if os.path.isdir(name) else args.cache_dir or datasets.config.HF_CACHE_HOME).resolve()
    path = folder / value["path"]
    if not path.resolve().is_relative_to(folder):
        inside = Path(os.path.normpath(path)).is_relative_to(folder)
        raise ValueError(f"{value['path']} {'is a link that leaves' if inside else 'is not in'} {folder}")
    return str(path.resolve())


# Copied from train_ncp_dpo_sd15.read_image
def read_image(value):
    """An image in RGB, upright, transparency on white, from encoded bytes, datasets' `{"bytes", "path"}` or a path."""
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    try:
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    except UnidentifiedImageError:
        start = value[:20] if isinstance(value, bytes) else Path(value).read_bytes()[:20]
        raise ValueError(
            "empty, 0 bytes"
            if not start
            else f"{start.decode()!r}... is text instead of an image; base64 has to be decoded"
            if start.isascii() and start.decode().isprintable()
            else "not in an image format that PIL knows"
        ) from None
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # whatever PIL's parsers run into
        warnings.warn("The metadata of an image cannot be parsed and is ignored: it is taken to be upright.")
    if image.mode.startswith(("I", "F")):
        image = reduce_to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Copied from train_ncp_dpo_sd15.reduce_to_8_bit
def reduce_to_8_bit(image):
    """Floats from 0 to 1, integers of 32 bits that hold 8 or 16, and 16 bits, all of which PIL would clip."""
    values = np.asarray(image).astype(np.float64)
    highest = 1 if image.mode == "F" else 255 if image.mode == "I" and values.max() <= 255 else 65535
    if not (values.min() >= 0 and values.max() <= highest):
        raise ValueError(f"its values go from {values.min():g} to {values.max():g}, but must be from 0 to {highest}")
    return Image.fromarray((values * (255 / highest)).round().astype(np.uint8))


# Copied from train_ncp_dpo_sd15.resize_and_crop
def resize_and_crop(image, args, crop_position, flip):
    """
    Resizes an image by its shorter side and crops a square.

    Args:
        image (`PIL.Image.Image`): in RGB.
        args (`argparse.Namespace`): `resolution` and `image_interpolation_mode`.
        crop_position (`tuple`): where to crop, 0 (top, left) to 1 (bottom, right).
        flip (`bool`): mirror the image first.

    Returns:
        `torch.Tensor` of shape `(3, resolution, resolution)` in 0 to 255, and the crop's `(top, left)` in pixels.
    """
    scale = args.resolution / min(image.size)
    size = [max(args.resolution, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling[args.image_interpolation_mode.upper()])
    if flip:
        image = ImageOps.mirror(image)
    top = round(crop_position[0] * (image.height - args.resolution))
    left = round(crop_position[1] * (image.width - args.resolution))
    image = image.crop((left, top, left + args.resolution, top + args.resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), (top, left)


def preprocess_image(image, args, crop_position, flip):
    """Adds SDXL's micro-conditioning: original height and width, the crop's top and left, target height and width."""
    pixel_values, crop = resize_and_crop(image, args, crop_position, flip)
    time_ids = torch.tensor([image.height, image.width, *crop, args.resolution, args.resolution], dtype=torch.float32)
    return {"pixel_values": pixel_values, "time_ids": time_ids}


# Copied from train_ncp_dpo_sd15.EncodedPairs
class EncodedPairs(PreferencePairs):
    """
    The same pairs from `--encoded_data_dir`, with `latents` instead of `pixel_values` and `prompt` instead of the caption.

    Args:
        pairs (`datasets.Dataset`): `row`, `label`, `caption`, `prompt` (a row of `prompts`) and `tensors`, safetensors of what
            `preprocess_image` gives of winner and loser, pixels as latents, each unflipped and, if at all, flipped.
        prompts (`datasets.Dataset`): `caption` and `tensors`, safetensors of what `encode_prompt` gives for it.
    """

    def __init__(self, pairs, prompts, *arguments):
        super().__init__(pairs, pairs["row"][:], *arguments)
        self.prompts = prompts
        self.index = {row: index for index, row in enumerate(self.rows)}

    def read(self, row, crop_position, flip):
        values = self.dataset[self.index[row]]
        images = safetensors.torch.load(values["tensors"])
        num_images = 1 if self.args.loss_type == "sft" else 2
        return {
            "images": [{name: value[i, int(flip)] for name, value in images.items()} for i in range(num_images)],
            "prompt": safetensors.torch.load(self.prompts[values["prompt"]]["tensors"]),
        }

    def digest(self):
        return digest_of_pairs(self.rows, self.dataset["label"][:], self.dataset["caption"][:])


# Copied from train_ncp_dpo_sd15.open_encoded_pairs
def open_encoded_pairs(args, vae_config, *arguments):
    """`EncodedPairs`; a `ValueError` if the data is not whole or was encoded by other settings than training's."""
    folder = Path(args.encoded_data_dir)
    if not (folder / "encoding.json").is_file():
        raise ValueError(f"--encoded_data_dir {folder} holds no encoding.json: tools/encode_preferences.py writes it.")
    encoding = json.loads((folder / "encoding.json").read_text(encoding="utf-8"))
    settings = {**vars(args), "vae_scaling_factor": vae_config["scaling_factor"]}
    for name in (*ENCODING_ARGUMENTS, "vae_scaling_factor"):
        if encoding[name] != settings[name]:
            raise ValueError(f"--{name} is {settings[name]!r}, but {folder} was encoded with {encoding[name]!r}.")
    if encoding["no_hflip"] and not args.no_hflip:
        raise ValueError(f"{folder} was encoded with --no_hflip and holds no flipped images: train with --no_hflip.")
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "mixed_precision"):
        if encoding[name] != settings[name]:
            logger.warning(f"--{name} is {settings[name]!r}, but {folder} was encoded with {encoding[name]!r}")
    parts = []
    for kind in ("pairs", "prompts"):
        shards = sorted((folder / kind).glob("*.arrow"))
        if len(shards) != encoding[f"num_{kind}_shards"]:
            raise ValueError(
                f"{folder / kind} holds {len(shards)} of {encoding[f'num_{kind}_shards']} files: run"
                " tools/encode_preferences.py again, it goes on where it stopped."
            )
        parts.append(datasets.concatenate_datasets([datasets.Dataset.from_file(str(shard)) for shard in shards]))
    pairs, prompts = parts
    if args.max_train_samples is not None:
        pairs = pairs.select(range(min(args.max_train_samples, len(pairs))))
    return EncodedPairs(pairs, prompts, args, *arguments)


# Copied from train_ncp_dpo_sd15.open_pairs
def open_pairs(args, accelerator, noise_scheduler, vae_config):
    """The pairs to train on, of which the first batch is known to be readable."""
    side = args.resolution // downscaling_factor(vae_config)
    drawn = (vae_config["latent_channels"], side, side), noise_scheduler.config.num_train_timesteps
    if args.encoded_data_dir is not None:
        pairs = open_encoded_pairs(args, vae_config, *drawn)
    else:
        dataset = load_dataset(args)
        pairs = PreferencePairs(dataset, find_rows(args, dataset), args, *drawn)
    num_pairs, global_batch_size = len(pairs.rows), args.train_batch_size * accelerator.num_processes
    if num_pairs < global_batch_size:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} on {accelerator.num_processes} process(es) takes"
            f" {global_batch_size} pairs, but there are {num_pairs}."
        )
    if num_pairs % global_batch_size:
        logger.info(
            f"{num_pairs % global_batch_size} of {num_pairs} pairs do not fill a batch: every epoch leaves others out"
        )
    for key in itertools.islice(EpochSampler(pairs.rows, args.seed), args.train_batch_size):
        pairs[key]
    return pairs


# Copied from train_ncp_dpo_sd15.collate_fn
def collate_fn(examples):
    """Stacks pairs; what belongs to images (`pixel_values`, …) has the winners first, then the losers."""
    batch = {"skipped": [reason for example in examples for reason in example.pop("skipped")]}
    if "caption" in examples[0]:
        batch["captions"] = [example.pop("caption") for example in examples]
    else:
        batch["prompt"] = default_collate([example.pop("prompt") for example in examples])
    images = [image for images in zip(*(example.pop("images") for example in examples)) for image in images]
    return {**batch, **default_collate(images), **default_collate(examples)}


# Copied from train_ncp_dpo_sd15.create_dataloader
def create_dataloader(args, pairs):
    """Batches of pairs, shuffled anew every epoch; what fills no batch is left out."""
    return torch.utils.data.DataLoader(
        pairs,
        batch_size=args.train_batch_size,
        sampler=EpochSampler(pairs.rows, args.seed),
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_stop_signals,
        drop_last=True,
    )


# Copied from train_ncp_dpo_sd15.ignore_stop_signals
def ignore_stop_signals(worker):
    # Ctrl-C and some schedulers signal the whole process group, of which workers must still serve the step in progress.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# Copied from train_ncp_dpo_sd15.remaining_batches
def remaining_batches(args, accelerator, dataloader, sampler, state):
    """
    Batches from `state`'s step on, which the caller counts, until `--max_train_steps`, each with the number of batches in its step: fewer than
    `--gradient_accumulation_steps` in an epoch's last. `sampler` is the one within `dataloader`.
    """
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    while state["global_step"] < args.max_train_steps:
        sampler.epoch, steps_done = divmod(state["global_step"], steps_per_epoch)
        first = steps_done * args.gradient_accumulation_steps
        sampler.start = first * args.train_batch_size * accelerator.num_processes
        for index, batch in enumerate(dataloader, start=first):
            position = index % args.gradient_accumulation_steps
            num_batches = min(args.gradient_accumulation_steps, len(dataloader) - index + position)
            yield batch, num_batches
            if state["global_step"] == args.max_train_steps:
                return


# The checkpoint


# Copied from train_ncp_dpo_sd15.check_checkpoint
def check_checkpoint(args):
    """
    Looks at the base model's configuration files, before anything large is read.

    Returns:
        The noise scheduler and the VAE's configuration.

    Raises:
        `ValueError`: names what this script cannot train, and what to do instead.
    """
    name = args.pretrained_model_name_or_path
    where = f"--pretrained_model_name_or_path {name}"
    if Path(name).is_file():
        raise ValueError(
            f"{where} is a single file. Convert it:"
            f' {PIPELINE_CLASS.__name__}.from_single_file("{name}").save_pretrained("{Path(name).with_suffix("")}")'
        )
    unet = load_config(args, "unet")
    kind = unet.get("addition_embed_type")
    if kind != ADDITION_EMBED_TYPE:
        script = {None: "train_ncp_dpo_sd15.py", "text_time": "train_ncp_dpo_sdxl.py"}.get(kind)
        raise ValueError(
            f"{where} is of another architecture: {f'use {script}' if script else 'no script trains it'}."
        )
    embedding_dim = sum(load_config(args, encoder)["hidden_size"] for encoder in TEXT_ENCODERS)
    if unet["cross_attention_dim"] != embedding_dim:
        raise ValueError(
            f"{where}: the U-Net takes text embeddings of size {unet['cross_attention_dim']}, but"
            f" {' and '.join(TEXT_ENCODERS)} give {embedding_dim}."
        )
    if args.loss_space == "ncp" and args.ncp_layer == "mid" and unet.get("mid_block_type", "default") is None:
        raise ValueError(f"{where} has no mid block: give --ncp_layer down.")

    vae = load_config(args, "vae")
    # What configurations from before this entry mean.
    vae.setdefault("scaling_factor", 0.18215)
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"{where}: the U-Net takes {unet['in_channels']} channels, the VAE gives {vae['latent_channels']}. Inpainting"
            " and similar models cannot be trained."
        )
    for option in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(option):
            raise ValueError(f"{where}: the VAE has a {option}, which is not supported.")
    factor = downscaling_factor(vae)
    if args.resolution % factor:
        raise ValueError(f"--resolution is {args.resolution}, but must be a multiple of {factor}, the VAE's factor.")

    scheduler = load_config(args, "scheduler", DDPMScheduler)
    if "beta_schedule" not in scheduler and "trained_betas" not in scheduler:
        raise ValueError(
            f"{where}: its scheduler, {scheduler['_class_name']}, has none of DDPM's noise levels. EDM and flow matching"
            " models cannot be trained."
        )
    noise_scheduler = DDPMScheduler.from_config(scheduler)
    if args.loss_space == "ncp":
        StepTable.from_scheduler(noise_scheduler, args.ncp_timestep)
    for component in ("unet", "vae", *TEXT_ENCODERS):
        choose_variant(args, component)
    return noise_scheduler, vae


# Copied from train_ncp_dpo_sd15.downscaling_factor
def downscaling_factor(vae_config):
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


# Copied from train_ncp_dpo_sd15.component_source
def component_source(args, component):
    """Where a part of the base model is, as arguments of `from_pretrained`."""
    if component == "vae" and args.pretrained_vae_model_name_or_path is not None:
        return {"pretrained_model_name_or_path": args.pretrained_vae_model_name_or_path}
    return {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "subfolder": component,
        "revision": args.revision,
    }


# Copied from train_ncp_dpo_sd15.load_config
def load_config(args, component, config_class=UNet2DConditionModel):
    source = component_source(args, component)
    try:
        return config_class.load_config(source.pop("pretrained_model_name_or_path"), **source)
    except OSError as error:
        raise ValueError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} has no {component} that"
            f" {Path(__file__).name} could train with: {one_line(error)}"
        ) from error


# Copied from train_ncp_dpo_sd15.choose_variant
def choose_variant(args, component):
    """`--variant`, or `None` for a part that has files of that variant no more than a pipeline would insist on."""
    source = component_source(args, component)
    name, folder = source["pretrained_model_name_or_path"], source.get("subfolder", "")
    if os.path.isdir(name):
        files = os.listdir(Path(name, folder))
    else:
        try:
            files = [
                Path(file).name for file in list_repo_files(name, revision=args.revision) if file.startswith(folder)
            ]
        except OfflineModeIsEnabled:
            return args.variant
    weights = [
        re.fullmatch(r"(?:diffusion_pytorch_)?model(\.[^.]+?)??(?:-\d+-of-\d+)?\.(?:safetensors|bin)", f)
        for f in files
    ]
    variants = {match[1] and match[1][1:] for match in weights if match}
    if args.variant in variants:
        return args.variant
    if None in variants:
        return None
    raise ValueError(
        f"--pretrained_model_name_or_path {name} has no weights for its {component} of the variant that is asked for, but"
        f" {' and '.join(f'--variant {variant}' for variant in sorted(variants)) or 'none at all'}."
    )


def pipeline_options(args):
    # Whether an empty prompt is embedded as zeros.
    config = PIPELINE_CLASS.load_config(args.pretrained_model_name_or_path, revision=args.revision)
    return {"force_zeros_for_empty_prompt": config.get("force_zeros_for_empty_prompt", True)}


# Copied from train_ncp_dpo_sd15.load_components
def load_components(args, accelerator, weight_dtype):
    """The frozen models beside the U-Net and their tokenizers, by their names in the pipeline; none if none is needed."""
    if args.encoded_data_dir is not None and not args.run_validation:
        return {}
    components = pipeline_options(args)
    for name, text_encoder_class in TEXT_ENCODERS.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        components[tokenizer] = CLIPTokenizer.from_pretrained(**component_source(args, tokenizer))
        components[name] = text_encoder_class.from_pretrained(
            **component_source(args, name), variant=choose_variant(args, name), torch_dtype=weight_dtype
        )
    # SDXL's own VAE overflows in fp16.
    components["vae"] = AutoencoderKL.from_pretrained(
        **component_source(args, "vae"),
        variant=choose_variant(args, "vae"),
        torch_dtype=torch.float32 if args.pretrained_vae_model_name_or_path is None else weight_dtype,
    )
    for name in ("vae", *TEXT_ENCODERS):
        components[name].requires_grad_(False).to(accelerator.device)
    return components


# Latents and embeddings


# Copied from train_ncp_dpo_sd15.encode_images
@torch.no_grad()
def encode_images(vae, pixel_values, batch_size):
    """Latents of images, the posterior's mode: `(N, 3, H, W)` in 0 to 255 to `(N, C, h, w)` in float32."""
    pixel_values = pixel_values.to(vae.device)
    latents = [
        vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist.mode() for pixels in pixel_values.split(batch_size)
    ]
    return torch.cat(latents).float() * vae.config.scaling_factor


# Copied from train_ncp_dpo_sd15.tokenize
def tokenize(components, name, captions):
    """The `input_ids` of captions, `(B, L)`, for the text encoder `name`."""
    tokenizer, text_encoder = components[name.replace("text_encoder", "tokenizer")], components[name]
    # Some tokenizers do not say how much is too much.
    max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    inputs = tokenizer(captions, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return inputs.input_ids.to(text_encoder.device)


@torch.no_grad()
def encode_prompt(components, captions):
    """
    Text embeddings of captions: `prompt_embeds` of shape `(B, L, D)`, of both text encoders, and `pooled_prompt_embeds` of
    shape `(B, P)`, of the second. Those of an empty caption are zeros where they are for the pipeline.
    """
    outputs = [
        components[name](tokenize(components, name, captions), output_hidden_states=True) for name in TEXT_ENCODERS
    ]
    prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled_prompt_embeds = outputs[-1].text_embeds
    if components["force_zeros_for_empty_prompt"]:
        empty = [index for index, caption in enumerate(captions) if caption == ""]
        prompt_embeds[empty], pooled_prompt_embeds[empty] = 0, 0
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}


def prompt_conditioning(prompt, batch, images_per_pair):
    """
    `encoder_hidden_states` of shape `(N, L, D)` and `added_cond_kwargs` for N images: `text_embeds` of shape `(N, P)` and
    the images' own `time_ids` of shape `(N, 6)`.
    """
    text_embeds = prompt["pooled_prompt_embeds"].repeat(images_per_pair, 1)
    encoder_hidden_states = prompt["prompt_embeds"].repeat(images_per_pair, 1, 1)
    return encoder_hidden_states, {"text_embeds": text_embeds, "time_ids": batch["time_ids"]}


# Noise, errors and the loss


# Copied from train_ncp_dpo_sd15.Denoising
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


# Copied from train_ncp_dpo_sd15.noise_batch
def noise_batch(args, batch, components, noise_scheduler):
    """Encodes a batch of pairs and adds each pair's noise at its timestep, to the winner and to the loser."""
    if args.encoded_data_dir is not None:
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


# Copied from train_ncp_dpo_sd15.measure_errors
def measure_errors(args, denoising, unet, policy, perception):
    """
    The policy's and the reference's errors of a batch.

    Args:
        denoising (`Denoising`): of the winners, then, except for sft, of their losers.
        unet (`torch.nn.Module`): the policy as accelerate wrapped it, so that gradients are averaged over processes.
        policy (`UNet2DConditionModel`): the model within, which is the reference and the encoder with its LoRA off.
        perception (`NoiseConditionedPerception` or `None`): `None` measures errors in latent space.

    Returns:
        Two tensors of shape `(N,)`; the second is `None` if the loss does without a reference.
    """
    needs_reference = args.loss_type not in REFERENCE_FREE_LOSS_TYPES
    ref_pred = denoising.predict_reference(policy) if needs_reference else None
    if perception is None:
        ref_errors = latent_error(ref_pred, denoising.target) if needs_reference else None
        return latent_error(denoising.predict(unet), denoising.target), ref_errors
    anchor = perception.anchor(**denoising._asdict(), ref_pred=ref_pred)
    return perception.error(denoising.predict(unet), anchor), anchor.ref_errors


# Copied from train_ncp_dpo_sd15.measure_loss
def measure_loss(args, errors, ref_errors):
    """The loss of a batch from its errors, and what to log: a dictionary of tensors of one value per pair."""
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
    if ref_errors is not None:
        # How far the policy has left the reference: what grows before a run diverges.
        observed["drift_w"], observed["drift_l"] = (errors.detach() - ref_errors).chunk(2)
    return result.loss, observed


# Copied from train_ncp_dpo_sd15.gather_metrics
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


# Copied from train_ncp_dpo_sd15.is_finite
def is_finite(accelerator, metrics):
    # In fp16 the gradient overflows now and then, which the loss scaler sees to, but for ever is not now and then.
    scaled = accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1
    return math.isfinite(metrics["loss"]) and (math.isfinite(metrics["grad_norm"]) or scaled)


# Copied from train_ncp_dpo_sd15.count_skipped_steps
def count_skipped_steps(args, accelerator, state, metrics, rows, skipped_steps):
    """Steps in a row that are not finite, this one included; a `RuntimeError` for one too many."""
    if is_finite(accelerator, metrics):
        return 0
    step = state["global_step"] + 1
    message = f"Step {step} is not finite: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, rows {rows}"
    if skipped_steps == args.max_skipped_steps:
        raise RuntimeError(
            f"{message}. --max_skipped_steps {args.max_skipped_steps} allows no more; checkpoints are intact."
        )
    logger.warning(f"{message}. It is skipped.")
    return skipped_steps + 1


# Copied from train_ncp_dpo_sd15.count_flat_steps
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


# Copied from train_ncp_dpo_sd15.perturbed_lora
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


# Copied from train_ncp_dpo_sd15.measure_error_scale
@torch.no_grad()
def measure_error_scale(args, accelerator, dataloader, policy, components, noise_scheduler, perception):
    """
    The factor that gives margins in feature space the spread they have in latent space, under the same small change of
    the policy. Reference-free losses get the factor of the others, and sft, which reads no losers, takes the change of
    the winners' errors for the margin.
    """
    # Every process takes other pairs, all of them as many.
    first, stride = accelerator.process_index, accelerator.num_processes
    num_batches = math.ceil(ERROR_SCALE_PAIRS / (args.train_batch_size * stride))
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


# Copied from train_ncp_dpo_sd15.create_perception
def create_perception(args, accelerator, dataloader, policy, components, noise_scheduler, saved):
    """What errors are measured with, its scale given, that of a checkpoint, or measured now; `None` for latent space."""
    if args.loss_space == "latent":
        return None
    perception = NoiseConditionedPerception(
        policy, noise_scheduler, args.ncp_layer, args.ncp_timestep, args.ncp_probe_rms
    )
    if args.ncp_error_scale != "auto":
        error_scale = args.ncp_error_scale
    elif saved is not None and all(saved["arguments"][name] == getattr(args, name) for name in ERROR_ARGUMENTS):
        error_scale = saved["error_scale"]
    else:
        error_scale = measure_error_scale(
            args, accelerator, dataloader, policy, components, noise_scheduler, perception
        )
    perception.error_scale = error_scale
    logger.info(f"Perceptual errors are scaled by --ncp_error_scale {error_scale}")
    return perception


# Setup


# Copied from train_ncp_dpo_sd15.create_accelerator
def create_accelerator(args):
    """Sets up accelerate, logging, the output folder and, if asked for, the repository on the hub."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
    )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but accelerate's configuration or"
            f" ACCELERATE_GRADIENT_ACCUMULATION_STEPS says {accelerator.gradient_accumulation_steps}. Give both the same."
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
                args.hub_model_id or Path(args.output_dir).resolve().name,
                private=args.hub_private_repo or None,
                exist_ok=True,
                token=args.hub_token,
            ).repo_id
    return accelerator


# Copied from train_ncp_dpo_sd15.set_run_seed
def set_run_seed(args, saved):
    """If no seed is given, takes over the checkpoint's or draws one, the same on every process."""
    if args.seed is None and saved is not None:
        args.seed = saved["arguments"]["seed"]
    if args.seed is None:
        args.seed = broadcast_object_list([int(np.random.SeedSequence().generate_state(1)[0])])[0]
        logger.info(f"Drew --seed {args.seed}")
    set_seed(args.seed)


# Copied from train_ncp_dpo_sd15.create_policy
def create_policy(args, accelerator, weight_dtype):
    """The frozen U-Net in `weight_dtype` with a LoRA in float32 that does nothing yet."""
    unet = UNet2DConditionModel.from_pretrained(
        **component_source(args, "unet"), variant=choose_variant(args, "unet"), torch_dtype=weight_dtype
    )
    unet.requires_grad_(False)
    unet.to(accelerator.device)
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


# Copied from train_ncp_dpo_sd15.create_optimizer
def create_optimizer(args, accelerator, policy):
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
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


# Copied from train_ncp_dpo_sd15.create_state
def create_state(args, accelerator, pairs, steps_per_epoch):
    """What a checkpoint's training_state.json holds. Sets `--max_train_steps` if only epochs are given."""
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    return {
        "global_step": 0,
        "error_scale": None,
        "num_processes": accelerator.num_processes,
        "arguments": {name: value for name, value in vars(args).items() if name != "hub_token"},
        "data": pairs.digest(),
    }


# Copied from train_ncp_dpo_sd15.create_lr_scheduler
def create_lr_scheduler(args, accelerator, optimizer):
    if args.lr_scheduler == "constant" and args.lr_warmup_steps not in (0, 500):
        logger.warning("--lr_scheduler constant ignores --lr_warmup_steps: constant_with_warmup has a warm-up")
    elif args.lr_scheduler != "constant" and args.lr_warmup_steps >= args.max_train_steps:
        logger.warning(
            f"--lr_warmup_steps {args.lr_warmup_steps} is not less than the {args.max_train_steps} steps of the run: the"
            " learning rate never reaches --learning_rate"
        )
    # accelerate steps it once per process.
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


# Checkpoints


# Copied from train_ncp_dpo_sd15.register_checkpoint_hooks
def register_checkpoint_hooks(accelerator, policy):
    """Checkpoints hold the LoRA in diffusers' format, which loads into the very adapter that trains."""

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            save_lora(policy, output_dir)
        # Or else accelerate would save the whole U-Net as well.
        weights.clear()

    def load(models, input_dir):
        models.clear()
        # Named, since older versions of diffusers look for it on the hub.
        lora = PIPELINE_CLASS.lora_state_dict(input_dir, weight_name=WEIGHTS_NAME)[0]
        lora = {name.removeprefix("unet."): value for name, value in lora.items()}
        result = set_peft_model_state_dict(policy, convert_unet_state_dict_to_peft(lora), adapter_name="default")
        missing = [name for name in result.missing_keys if "lora" in name]
        if missing or result.unexpected_keys:
            raise ValueError(f"The LoRA in {input_dir} does not fit: {missing + result.unexpected_keys}.")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


# Copied from train_ncp_dpo_sd15.save_lora
def save_lora(policy, folder):
    PIPELINE_CLASS.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(policy)),
        **_collate_lora_metadata({"unet": policy}),
    )


# Copied from train_ncp_dpo_sd15.find_checkpoints
def find_checkpoints(output_dir):
    """Complete checkpoints in ascending order of their steps: `checkpoint-` and digits, whatever else lies there."""
    folders = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE_NAME}")]
    folders = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name.split("-")[1]))


# Copied from train_ncp_dpo_sd15.read_state
def read_state(checkpoint):
    return json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))


# Copied from train_ncp_dpo_sd15.save_checkpoint
def save_checkpoint(args, accelerator, state):
    """
    Writes `checkpoint-N`, which appears under that name only when all of it is on the disk, then removes those over the
    limit. `state` is what its training_state.json will hold.
    """
    folder = Path(args.output_dir) / f"checkpoint-{state['global_step']}"
    incomplete = folder.with_name(f"incomplete-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(incomplete, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(incomplete))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (incomplete / STATE_NAME).write_text(json.dumps(state, indent=2), encoding="utf-8")
            for path in [*incomplete.rglob("*"), incomplete]:
                synchronize(path)
            incomplete.rename(folder)
            synchronize(folder.parent)
        accelerator.wait_for_everyone()
        # What a machine that does not share --output_dir keeps of it.
        shutil.rmtree(incomplete, ignore_errors=True)
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


# Copied from train_ncp_dpo_sd15.synchronize
def synchronize(path):
    """Waits until a file or folder is on the disk itself, where that can be asked for."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems synchronize nothing. A disk that is full or broken says something else.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# Copied from train_ncp_dpo_sd15.find_checkpoint_to_resume
def find_checkpoint_to_resume(args, accelerator):
    """
    The folder that `--resume_from_checkpoint` means and what its training_state.json holds, or two `None` for a new run. The
    main process decides, since machines need not share `--output_dir`; each must have the checkpoint that it chose.
    """
    choice = [None, None, None]
    if accelerator.is_main_process:
        try:
            checkpoint = choose_checkpoint(args)
            choice = [checkpoint, checkpoint and read_state(checkpoint), None]
        except ValueError as error:
            choice[2] = str(error)
    checkpoint, state, problem = broadcast_object_list(choice)
    if problem is not None:
        raise ValueError(problem)
    if checkpoint is not None:
        has_it = (checkpoint / STATE_NAME).is_file() and read_state(checkpoint) == state
        without = [rank for rank, has in enumerate(gather_object([has_it])) if not has]
        if without:
            raise ValueError(
                f"Process 0 resumes from {checkpoint}, which is not there, or another one, for the processes"
                f" {without}: copy it to their machines, or share --output_dir."
            )
    return checkpoint, state


# Copied from train_ncp_dpo_sd15.choose_checkpoint
def choose_checkpoint(args):
    checkpoints = find_checkpoints(args.output_dir)
    finished = Path(args.output_dir, WEIGHTS_NAME).is_file()
    if args.resume_from_checkpoint is None:
        if checkpoints or finished:
            raise ValueError(
                f"--output_dir {args.output_dir} holds {checkpoints[-1].name if checkpoints else 'the LoRA'} of another"
                " run. Give another folder, or continue that run by --resume_from_checkpoint latest."
            )
        return None
    if args.resume_from_checkpoint == "latest":
        for path in set(Path(args.output_dir).glob("*checkpoint-*")) - set(checkpoints):
            logger.warning(f"{path} is passed over: it is no complete checkpoint")
        if not checkpoints and finished:
            raise ValueError(
                f"--output_dir {args.output_dir} holds a finished LoRA and no checkpoint to resume from. Give another"
                " folder."
            )
        if not checkpoints:
            logger.info(f"There is no checkpoint in {args.output_dir} yet: starting anew")
            return None
        return checkpoints[-1]
    named = [Path(args.resume_from_checkpoint), Path(args.output_dir, args.resume_from_checkpoint)]
    found = [folder for folder in named if (folder / STATE_NAME).is_file()]
    if not found:
        raise ValueError(f"--resume_from_checkpoint: there is no checkpoint {named[0]}, nor {named[1]}.")
    global_step = read_state(found[0])["global_step"]
    later = [folder.name for folder in checkpoints if int(folder.name.split("-")[1]) > global_step]
    if later:
        raise ValueError(
            f"--output_dir {args.output_dir} holds {', '.join(later)}, which a run from {found[0]} would meet. Remove what"
            " is not wanted, or give another folder."
        )
    return found[0]


# Copied from train_ncp_dpo_sd15.check_resume
def check_resume(args, checkpoint, saved, state):
    """A `ValueError` for what would change a resumed run without a word: `saved` is its checkpoint's state, `state` ours."""
    if state["num_processes"] != saved["num_processes"]:
        # Nor could --allow_resume_changes help: steps of the learning rate's schedule are counted once per process.
        raise ValueError(
            f"{checkpoint} is of {saved['num_processes']} processes, not {state['num_processes']}: give accelerate"
            f" launch --num_processes {saved['num_processes']}."
        )
    if args.max_train_steps < saved["global_step"]:
        raise ValueError(f"--max_train_steps is {args.max_train_steps}, but {checkpoint} is further on.")
    names = LEARNING_ARGUMENTS
    if not args.lr_scheduler.startswith("constant"):
        # The learning rate falls towards the last step.
        names = [*names, "max_train_steps"]
    parser = create_parser()
    # What a checkpoint from before a flag was trained with is the flag's default.
    before = {name: saved["arguments"].get(name, parser.get_default(name)) for name in names}
    if args.ncp_error_scale in ("auto", saved["error_scale"]):
        before["ncp_error_scale"] = args.ncp_error_scale
    changes = [
        f"--{name} is {getattr(args, name)!r}, but was {before[name]!r}"
        for name in names
        if getattr(args, name) != before[name]
    ]
    if saved.get("data", state["data"]) != state["data"]:
        changes.append(
            f"the data are {state['data']['num_pairs']} pairs, but were {saved['data']['num_pairs']} others"
        )
    if changes and not args.allow_resume_changes:
        raise ValueError(
            f"{'; '.join(changes)} in {checkpoint}. Give what it was, or --allow_resume_changes if you mean it."
        )
    for change in changes:
        logger.warning(f"{change} in {checkpoint}")


# The run


# Copied from train_ncp_dpo_sd15.report_skipped_pairs
def report_skipped_pairs(batch):
    for reason in batch["skipped"]:
        logger.warning(f"{reason}. The next pair takes its place.", main_process_only=False)
    return len(batch["skipped"])


# Copied from train_ncp_dpo_sd15.create_progress_bar
def create_progress_bar(args, accelerator, global_step):
    logger.info(f"Training for {args.max_train_steps} steps")
    return tqdm(
        total=args.max_train_steps,
        initial=global_step,
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )


# Copied from train_ncp_dpo_sd15.log_metrics
def log_metrics(accelerator, progress_bar, metrics, lr_scheduler, global_step):
    progress_bar.update()
    progress_bar.set_postfix({name: f"{metrics[name]:.4g}" for name in PROGRESS_METRICS if name in metrics})
    accelerator.log({**metrics, "lr": lr_scheduler.get_last_lr()[0]}, step=global_step)


# Copied from train_ncp_dpo_sd15.catch_stop_signals
def catch_stop_signals():
    """A list to which SIGTERM and SIGINT add their number, the first of each: a second one stops at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)
    return received


# Copied from train_ncp_dpo_sd15.stop
def stop(accelerator, stop_signals):
    """Ends a run that was told to stop, its checkpoint saved, with the command that goes on."""
    accelerator.end_training()
    number = stop_signals[0] if stop_signals else signal.SIGTERM
    words, given = [], iter(sys.argv)
    for word in given:
        # Neither an earlier checkpoint nor a secret.
        flag = next((flag for flag in ("--resume_from_checkpoint", "--hub_token") if word.startswith(flag)), None)
        if flag is None:
            words.append(word)
        elif word == flag:
            next(given)
    logger.info(
        f"Stopped by {signal.Signals(number).name}. To go on:\n"
        f"accelerate launch --num_processes {accelerator.num_processes} {shlex.join(words)} --resume_from_checkpoint latest"
    )
    sys.exit(128 + number)


# Copied from train_ncp_dpo_sd15.upload_results
def upload_results(args):
    """With `--push_to_hub`, uploads what training wrote, less its checkpoints, and nothing else that lies there."""
    if args.push_to_hub:
        upload_folder(
            repo_id=args.hub_model_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            allow_patterns=[WEIGHTS_NAME, "README.md", "validation/*.png", f"{args.logging_dir}/**"],
            token=args.hub_token,
        )


# Copied from train_ncp_dpo_sd15.main
def main(args):
    accelerator = create_accelerator(args)
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    # Whatever can be wrong is found before a model is loaded.
    noise_scheduler, vae_config = check_checkpoint(args)
    checkpoint, saved = find_checkpoint_to_resume(args, accelerator)
    set_run_seed(args, saved)
    pairs = open_pairs(args, accelerator, noise_scheduler, vae_config)
    dataloader = create_dataloader(args, pairs)
    train_dataloader = accelerator.prepare(dataloader)
    state = create_state(args, accelerator, pairs, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
    if checkpoint is not None:
        check_resume(args, checkpoint, saved, state)

    components = load_components(args, accelerator, weight_dtype)
    policy = create_policy(args, accelerator, weight_dtype)
    optimizer = create_optimizer(args, accelerator, policy)
    lr_scheduler = create_lr_scheduler(args, accelerator, optimizer)
    # `unet` is what gradients are averaged through; `policy`, the model in it, is the reference and the encoder as well.
    unet, optimizer, lr_scheduler = accelerator.prepare(policy, optimizer, lr_scheduler)
    register_checkpoint_hooks(accelerator, policy)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        state["global_step"] = saved["global_step"]
        logger.info(f"Resumed from {checkpoint}")
    perception = create_perception(args, accelerator, dataloader, policy, components, noise_scheduler, saved)
    state["error_scale"] = perception and perception.error_scale
    accelerator.init_trackers(args.tracker_name, {**state["arguments"], "ncp_error_scale": state["error_scale"]})
    draw_images = functools.partial(log_validation, args, accelerator, policy, components, weight_dtype)
    with adapters_disabled(policy):
        # Of a resumed run as well, which may have another folder or prompt.
        draw_images(0)

    progress_bar = create_progress_bar(args, accelerator, state["global_step"])
    unet.train()
    stop_signals = catch_stop_signals()
    observed, flat_steps, skipped_steps, num_skipped_pairs, stops = [], 0, 0, 0, False
    for batch, num_batches in remaining_batches(args, accelerator, train_dataloader, dataloader.sampler, state):
        num_skipped_pairs += report_skipped_pairs(batch)
        with accelerator.accumulate(unet):
            denoising = noise_batch(args, batch, components, noise_scheduler)
            errors, ref_errors = measure_errors(args, denoising, unet, policy, perception)
            loss, values = measure_loss(args, errors, ref_errors)
            # accelerate divides by the flag, even where an epoch's last step has fewer batches.
            accelerator.backward(loss * args.gradient_accumulation_steps / num_batches)
            observed.append({**values, "rows": batch["rows"]})
            if accelerator.sync_gradients:
                metrics, rows = gather_metrics(args, accelerator, observed)
                metrics["grad_norm"] = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
                skipped_steps = count_skipped_steps(args, accelerator, state, metrics, rows, skipped_steps)
                if skipped_steps > 0:
                    optimizer.zero_grad()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        observed.clear()
        state["global_step"] += 1
        flat_steps = count_flat_steps(args, metrics, flat_steps)
        log_metrics(accelerator, progress_bar, metrics, lr_scheduler, state["global_step"])
        # The signal may not have reached every process.
        stops = accelerator.reduce(torch.tensor(sum(stop_signals), device=accelerator.device)).item() > 0
        ends = state["global_step"] == args.max_train_steps
        if state["global_step"] % args.checkpointing_steps == 0 or stops or ends:
            save_checkpoint(args, accelerator, state)
        if stops:
            break
        if state["global_step"] % args.validation_steps == 0 and not ends:
            draw_images(state["global_step"])

    accelerator.wait_for_everyone()
    # A wrapped model that outlives its process group destroys it with Python's lock held, which gloo's threads may want.
    unet, optimizer, lr_scheduler = accelerator.free_memory(unet, optimizer, lr_scheduler)
    if num_skipped_pairs:
        logger.info(f"{num_skipped_pairs} unreadable pairs were skipped", main_process_only=False)
    if stops:
        stop(accelerator, stop_signals)
    if accelerator.is_main_process:
        save_lora(policy, args.output_dir)
        draw_images(args.max_train_steps)
        save_model_card(args, accelerator.num_processes, state["error_scale"])
        upload_results(args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
