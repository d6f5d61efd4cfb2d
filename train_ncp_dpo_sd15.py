#!/usr/bin/env python
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

r"""Trains a LoRA for Stable Diffusion 1.x or 2.x on preference pairs, by DPO, CPO, SFT and others, in the feature space
of the frozen U-Net's encoder (Noise-Conditioned Perception, arXiv:2406.17636) or in latent space.

    accelerate launch train_ncp_dpo_sd15.py \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name kashif/pickascore \
      --dataset_split_name validation --mixed_precision bf16 --rank 64 --gradient_checkpointing \
      --dataloader_num_workers 4 --learning_rate 1e-5 --max_train_steps 1000 --output_dir ncp-dpo-sd15

The U-Net with its LoRA is the policy. The same U-Net with the LoRA switched off is the reference model and the
perceptual encoder. `preference_pairs.py` reads the pairs and `ncp_loss.py` computes errors and losses.
"""

import argparse
import collections
import contextlib
import copy
import csv
import ctypes
import errno
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import filelock
import ncp_loss
import numpy as np
import preference_pairs
import safetensors.torch
import torch
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list, compare_versions, gather_object, send_to_device, tqdm
from huggingface_hub import ModelCard, ModelCardData, create_repo, file_exists, hf_hub_download, upload_folder
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from PIL import Image, ImageDraw
from preference_pairs import COUNT, INDEX, NOT_NEGATIVE, POSITIVE, InputError, number_type, one_line

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import check_min_version, make_image_grid
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.36.0")

logger = get_logger(__name__)

DTYPE = "torch_dtype" if compare_versions("diffusers", "<", "0.40.0") else "dtype"
PIPELINE_CLASS = StableDiffusionPipeline
# No safety checker: it would black out validation images.
PIPELINE_OPTIONS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
TEXT_ENCODERS = {"text_encoder": "tokenizer"}
DEFAULTS = {"output_dir": "ncp-dpo-sd15-lora", "tracker_name": "ncp-dpo-sd15-lora"}
ADDITION_EMBED_TYPE = None  # the U-Net's, which tells SDXL from other models
VAE_OVERFLOWS = False  # whether the base model's own VAE must run in fp32
BETAS = {}  # where they differ from those of `ncp_loss.LOSSES`

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS_NAME = "pytorch_lora_weights_kohya.safetensors"
KOHYA_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}  # by the width of text embeddings
# Inputs of a U-Net that training does not give.
OTHER_INPUTS = "time_cond_proj_dim class_embed_type num_class_embeds encoder_hid_dim_type attention_type".split()
LAUNCHER = os.getppid()
STATE_NAME = "training_state.json"
# A resumed run must have the same values as its checkpoint.
LEARNING_ARGUMENTS = """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path pretrained_lora_path revision variant
    image_0_column image_1_column label_column preference_probability_column num_eval_pairs mixed_precision
    resolution random_crop no_hflip image_interpolation_mode min_timestep max_timestep timesteps
    loss_type loss_space beta_dpo sft_weight label_smoothing target_margin rank lora_alpha seed
    ncp_layer ncp_timestep ncp_probe_rms ncp_error_scale
    learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power
    use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
""".split()
EVAL_METRICS = ("loss", "implicit_accuracy", "margin", "error_w", "error_l", "drift_w", "drift_l")
# The error scale is measured for these.
SCALE_ARGUMENTS = "loss_space ncp_layer ncp_timestep ncp_probe_rms min_timestep max_timestep timesteps".split()
# It is measured in blocks of pairs, until the standard error of its logarithm is small enough. Batches of another size
# would round differently.
SCALE_BLOCK_SIZE, MAX_SCALE_PAIRS, SCALE_BATCH_SIZE, SCALE_STANDARD_ERROR = 64, 512, 2, 0.1
# No flag gives the steps of a piecewise constant schedule.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]


# Arguments


BELOW_1 = number_type(float, "in [0, 1)", lambda value: 0 <= value < 1)
SHARE = number_type(float, "in [0, 0.5)", lambda value: 0 <= value < 0.5)
SEED = number_type(int, "from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)


def create_parser():
    def auto_or_positive(text):
        return text if text == "auto" else POSITIVE(text)

    formatter = preference_pairs.HelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    preference_pairs.add_arguments(parser)

    add = parser.add_argument_group("training data").add_argument
    add("--encoded_data_dir", help="Output of tools/encode_preferences.py, in place of a dataset.")
    add("--num_eval_pairs", type=COUNT, help="Hold out at least so many pairs, by prompt; see --validation_steps.")
    add("--random_crop", action="store_true", help="Crop at random instead of at the centre.")
    add("--dataloader_num_workers", type=INDEX, default=0, help="Processes that load images. 0: the main process.")

    add = parser.add_argument_group("policy").add_argument
    add("--pretrained_lora_path", help="LoRA to start from. A frozen copy is the reference.")
    add("--rank", type=COUNT, help="Default: 4, or that of --pretrained_lora_path. The paper: 64.")
    add("--lora_alpha", type=COUNT, help="The LoRA is scaled by alpha / rank. Default: the rank.")

    add = parser.add_argument_group("loss").add_argument
    add("--loss_type", choices=ncp_loss.LOSSES, default="dpo", help="The loss; dpo is the paper's.")
    add("--loss_space", choices=["ncp", "latent"], default="ncp", help="Space of the errors; ncp is the paper's.")
    betas = [f"{name} {BETAS.get(name, loss.beta):g}" for name, loss in ncp_loss.LOSSES.items() if loss.beta != 5000]
    beta = f"Beta; in most losses the larger, the closer to the reference. Default: 5000, {', '.join(betas)}."
    add("--beta_dpo", type=POSITIVE, help=beta)
    add("--sft_weight", type=NOT_NEGATIVE, help="Weight of the winner's error on top. Default: 1 in cpo, else 0.")
    add("--label_smoothing", type=SHARE, default=0.0, help="Share of labels assumed to be wrong (dpo and cpo).")
    add("--target_margin", type=NOT_NEGATIVE, default=1.0, help="Value that logits should exceed (simpo).")
    add("--min_timestep", type=INDEX, default=0, help="First timestep to train on.")
    add("--max_timestep", type=INDEX, help="Last timestep to train on. Default: the noise scheduler's.")
    add("--timesteps", type=INDEX, nargs="+", help="Train on these, e.g. 249 499 749 999 of a few-step model.")
    add("--ncp_layer", choices=ncp_loss.LAYERS, default="mid", help="Block whose features are compared.")
    add("--ncp_timestep", choices=ncp_loss.TARGET_TIMESTEPS, default="previous", help="Timestep of the features.")
    add("--ncp_probe_rms", type=NOT_NEGATIVE, help="Size that steps are enlarged to; 0: never. Default: by precision.")
    scale = "Unit of perceptual errors. auto: measured, so that beta means what it does in latent space; the paper: 1."
    add("--ncp_error_scale", type=auto_or_positive, default="auto", help=scale)

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", help="Folder for all output.")
    add("--seed", type=SEED, help="Default: a random one, which is logged.")
    add("--train_batch_size", type=COUNT, default=4, help="Pairs per process and batch.")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="Batches per optimization step.")
    add("--num_train_epochs", type=COUNT, default=1, help="Ignored if --max_train_steps is given.")
    add("--max_train_steps", type=COUNT, help="Optimization steps in total.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, more time.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Of all but the LoRA. Default: accelerate's config.")
    add("--compile", action="store_true", help="Compile the U-Net's transformer blocks; the first steps take minutes.")
    add("--channels_last", action="store_true", help="Keep the U-Net's convolutions in the channels-last format.")
    add("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs use TF32 in fp32.")
    add("--learning_rate", type=NOT_NEGATIVE, default=5e-4, help="Start with 1e-5. The default is diffusers'.")
    add("--scale_lr", action="store_true", help="Multiply the learning rate by the pairs per step.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="Schedule of the learning rate.")
    add("--lr_warmup_steps", type=INDEX, default=500, help="Steps of warm-up, for schedules that have one.")
    add("--lr_num_cycles", type=COUNT, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=POSITIVE, default=1.0, help="Power of polynomial.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    add("--adam_beta1", type=BELOW_1, default=0.9, help="Decay of the gradient's mean.")
    add("--adam_beta2", type=BELOW_1, default=0.999, help="Decay of the gradient's mean square.")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="Weight decay of the LoRA.")
    add("--adam_epsilon", type=NOT_NEGATIVE, default=1e-8, help="Is added to the root of the mean square.")
    add("--max_grad_norm", type=NOT_NEGATIVE, default=1.0, help="A gradient of a larger norm is scaled down; 0: none.")
    add("--ddp_timeout", type=COUNT, default=1800, help="Seconds after which a silent process is lost.")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpointing_steps", type=COUNT, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=COUNT, help="Number of checkpoints to keep.")
    add("--resume_from_checkpoint", help="A checkpoint's folder, its name in --output_dir, or latest.")
    add("--allow_resume_changes", action="store_true", help="Resume even if settings differ from the checkpoint's.")
    add("--max_skipped_steps", type=INDEX, default=0, help="Steps in a row that may be skipped if not finite.")

    add = parser.add_argument_group("reports").add_argument
    add("--report_to", choices=["none", *map(str, LoggerType)], default="tensorboard", help="The tracker.")
    add("--tracker_name", help="Name of the project in the tracker.")
    add("--logging_dir", default="logs", help="Folder within --output_dir for the tracker.")
    add("--run_validation", action="store_true", help="Draw images before, during and after training.")
    add("--validation_prompt", help="Prompt of these images.")
    add("--num_validation_images", type=COUNT, default=4, help="Number of these images.")
    add("--validation_steps", type=COUNT, default=200, help="Steps between validations and held-out measurements.")
    add("--push_to_hub", action="store_true", help="Upload the LoRA, its card, pictures and logs.")
    add("--hub_token", help="Default: that of `hf auth login`.")
    add("--hub_model_id", help="Default: the name of --output_dir.")
    add("--hub_private_repo", action="store_true", help="Make the repository private.")

    parser.set_defaults(**DEFAULTS)
    return parser


def check_arguments(args):
    """Raises an `InputError` for flags that exclude each other or lack a partner."""
    if [args.dataset_name, args.train_data_dir, args.encoded_data_dir].count(None) != 2:
        raise InputError("Give exactly one of --dataset_name, --train_data_dir and --encoded_data_dir.")
    if args.encoded_data_dir is not None and args.random_crop:
        raise InputError("--random_crop does not go with --encoded_data_dir, which holds one crop of every image.")
    if args.timesteps is not None and (args.min_timestep, args.max_timestep) != (0, None):
        raise InputError("Give either --timesteps or --min_timestep and --max_timestep.")
    if args.label_smoothing and not ncp_loss.LOSSES[args.loss_type].has_label_smoothing:
        raise InputError(f"--label_smoothing goes with --loss_type dpo or cpo, not {args.loss_type}.")
    if args.sft_weight is not None and args.loss_type == "sft":
        raise InputError("--sft_weight does not go with --loss_type sft.")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and not torch.accelerator.is_available():
        raise InputError("--mixed_precision fp16 needs a GPU; bf16 does not.")
    if args.run_validation and args.validation_prompt is None:
        raise InputError("--run_validation needs a --validation_prompt.")
    if args.hub_token is not None and args.report_to not in ("none", "tensorboard"):
        raise InputError("--hub_token would show up in the logs of wandb and others. Use `hf auth login` instead.")
    if args.report_to not in ("none", "all", *map(str, get_available_trackers())):
        raise ImportError(f"--report_to {args.report_to} needs `pip install {args.report_to}`.")


def parse_args(input_args=None):
    args = create_parser().parse_args(input_args)
    check_arguments(args)
    if args.rank is None and args.pretrained_lora_path is None:
        args.rank = 4
    loss = ncp_loss.LOSSES[args.loss_type]
    args.beta_dpo = args.beta_dpo or BETAS.get(args.loss_type, loss.beta)
    if args.sft_weight is None:
        args.sft_weight = loss.sft_weight
    return args


# The base model


def check_checkpoint(args):
    """The noise scheduler, the VAE's configuration and the timesteps to train on, if the base model can be trained."""
    name, own_vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    base = f"--pretrained_model_name_or_path {name}"
    if Path(name).is_file():
        raise InputError(f"{base} is a file. {PIPELINE_CLASS.__name__}.from_single_file converts it to a folder.")
    unet, vae = load_config(args, "unet"), load_config(args, "vae")
    vae_base = base if own_vae is None else f"--pretrained_vae_model_name_or_path {own_vae}"
    if (vae_class := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise InputError(f"{vae_base}: the VAE is of class {vae_class}, but must be an AutoencoderKL.")
    for option in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(option):
            raise InputError(f"{vae_base}: the VAE has a {option}, which is not supported.")
    vae.setdefault("scaling_factor", 0.18215)  # Old configurations do not say it.
    vae["downscaling_factor"] = factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if args.resolution is None:
        args.resolution = preference_pairs.load_encoding(args).get("resolution") or unet["sample_size"] * factor
    if args.resolution % factor:
        raise InputError(f"--resolution is {args.resolution}, but must be a multiple of {factor}.")
    if (embed_type := unet.get("addition_embed_type")) != ADDITION_EMBED_TYPE:
        script = {None: "train_ncp_dpo_sd15.py", "text_time": "train_ncp_dpo_sdxl.py"}.get(embed_type, "no script")
        raise InputError(f"{base} has another architecture: {script} trains it.")
    if extra := [name for name in OTHER_INPUTS if unet.get(name) not in (None, "default")]:
        raise InputError(f"{base}: the U-Net has a {extra[0]}, an input that training does not give.")
    width = sum(load_config(args, encoder)["hidden_size"] for encoder in TEXT_ENCODERS)
    if (wanted := unet["cross_attention_dim"]) != width:
        raise InputError(f"{base}: the U-Net takes embeddings of width {wanted}, but the text encoders give {width}.")
    if (taken := unet["in_channels"]) != (given := vae["latent_channels"]):
        raise InputError(f"{base}: the U-Net takes {taken} channels, as for inpainting, but the VAE gives {given}.")
    if args.loss_space == "ncp" and args.ncp_layer == "mid" and unet.get("mid_block_type", "default") is None:
        raise InputError(f"{base} has no mid block: give --ncp_layer down.")
    config = load_config(args, "scheduler", DDPMScheduler)
    if not {"beta_schedule", "trained_betas"} & config.keys():
        raise InputError(f"{base}: its {config['_class_name']} has no betas of DDPM, as in EDM and flow matching.")
    noise_scheduler = DDPMScheduler.from_config(config)
    if args.loss_space == "ncp" or config.get("prediction_type") not in ("epsilon", "v_prediction", "sample", None):
        try:
            ncp_loss.StepTable.from_scheduler(noise_scheduler, args.ncp_timestep)
        except ValueError as error:
            raise InputError(f"{base}: {error}") from error
    last = noise_scheduler.config.num_train_timesteps - 1
    first, end = args.min_timestep, last if args.max_timestep is None else args.max_timestep
    timesteps = sorted(set(args.timesteps or range(first, end + 1)))
    if not timesteps or timesteps[-1] > last:
        raise InputError(f"--timesteps or --min_timestep {first} to --max_timestep {end} must be within 0 and {last}.")
    return noise_scheduler, vae, torch.tensor(timesteps)


def load_config(args, component, config_class=UNet2DConditionModel):
    flag, source = "pretrained_model_name_or_path", {"subfolder": component, "revision": args.revision}
    if component == "vae" and args.pretrained_vae_model_name_or_path is not None:
        flag, source = "pretrained_vae_model_name_or_path", {}
    try:
        return config_class.load_config(getattr(args, flag), **source)
    except OSError as error:
        raise InputError(f"--{flag} {getattr(args, flag)} has no {component}: {one_line(error)}") from error


def load_pipeline(args, accelerator, **components):
    """The base model's pipeline, without VAE and text encoders if nothing is encoded. `components` replace its own."""
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    dtypes, own_vae = {"default": weight_dtype}, args.pretrained_vae_model_name_or_path
    if args.encoded_data_dir is not None and not args.run_validation:
        components.update(dict.fromkeys(["vae", *TEXT_ENCODERS, *TEXT_ENCODERS.values()]))
    elif own_vae is None and VAE_OVERFLOWS:
        dtypes["vae"] = torch.float32
    name, options = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
    try:
        if own_vae is not None and "vae" not in components:
            components["vae"] = AutoencoderKL.from_pretrained(own_vae, **{DTYPE: weight_dtype})
        pipeline = PIPELINE_CLASS.from_pretrained(name, **options, **PIPELINE_OPTIONS, **components, **{DTYPE: dtypes})
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        advice = f"{one_line(error)}. If its files are all of one variant, such as fp16, give --variant."
        reason = preference_pairs.find_fault(own_vae, name) or advice
        raise InputError(f"--pretrained_model_name_or_path {name}: {reason}") from error
    for encoder, name in TEXT_ENCODERS.items() if pipeline.text_encoder is not None else []:
        tokenizer = getattr(pipeline, name)
        # Some tokenizers do not know the text encoder's limit.
        limit = getattr(pipeline, encoder).config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device)


# The policy


def find_alphas(ranks, alphas, config):
    """The alpha of each layer of `ranks`, `{layer: rank}`: that of `alphas`, of PEFT's configuration, or the rank."""
    patterns, found = config.get("unet.alpha_pattern") or {}, {}
    for layer, rank in ranks.items():
        alpha = patterns.get(get_pattern_key(patterns, layer), config.get("unet.lora_alpha", rank))
        # A rank-stabilized LoRA is scaled by alpha / sqrt(rank).
        alpha *= math.sqrt(rank) if config.get("unet.use_rslora") else 1
        found[layer] = alphas.get(layer, alpha)
    return found


def load_pretrained_lora(args):
    """The LoRA of `--pretrained_lora_path`, in diffusers' or kohya's format, or `None`: weights by PEFT's names, and a
    `LoraConfig` with the rank and alpha of each layer."""
    if (path := args.pretrained_lora_path) is None:
        return None
    flag = f"--pretrained_lora_path {path}"
    # Translates the block names of some SDXL files.
    options = {"unet_config": argparse.Namespace(**load_config(args, "unet")), "return_lora_metadata": True}
    try:
        source = path if os.path.exists(path) else hf_hub_download(path, WEIGHTS_NAME)
        file = Path(source, WEIGHTS_NAME) if os.path.isdir(source) else Path(source)
        with safetensors.safe_open(file, "pt") as opened:
            num_weights = sum(not name.endswith(".alpha") for name in opened.keys())
        options["weight_name"] = file.name
        tensors, kohya_alphas, metadata = PIPELINE_CLASS.lora_state_dict(file.parent, **options)
    except Exception as error:  # the converters raise many kinds
        reason = preference_pairs.find_fault(path) or one_line(error)
        raise InputError(f"{flag} cannot be read as a LoRA: {reason}") from error
    if (lost := num_weights - len(tensors)) > 0:  # such as the scales of a DoRA in kohya's format
        raise InputError(f"{flag}: diffusers drops {lost} of its weights. Give a plain LoRA.")
    # diffusers names these alphas after weights.
    kohya_alphas = {
        re.sub(r"(\.lora_[AB]\.weight)?\.alpha$", "", name.removeprefix("unet.")): alpha
        for name, alpha in convert_unet_state_dict_to_peft(kohya_alphas or {}).items()
    }
    weights = {}
    for name, weight in convert_unet_state_dict_to_peft(tensors).items():
        if not re.fullmatch(r"unet\..+\.lora_[AB]\.weight", name):
            raise InputError(f"{flag} holds {name}, but must hold a U-Net's plain LoRA alone.")
        weights[name.removeprefix("unet.")] = weight
    ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in weights.items() if ".lora_A." in name}
    if not weights or weights.keys() != {f"{layer}.lora_{side}.weight" for layer in ranks for side in "AB"}:
        raise InputError(f"{flag}: {len(weights)} weights are not two for each of its layers.")
    alphas = find_alphas(ranks, kohya_alphas, metadata or {})
    for name, found in (("rank", ranks), ("lora_alpha", alphas)):
        if (given := getattr(args, name)) is not None and (values := {*found.values()}) != {given}:
            raise InputError(f"--{name} is {given}, but {flag} has {sorted(values)}.")
    (rank, alpha), _ = collections.Counter(zip(ranks.values(), alphas.values())).most_common(1)[0]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(ranks))
    config.rank_pattern = {layer: value for layer, value in ranks.items() if value != rank}
    config.alpha_pattern = {layer: value for layer, value in alphas.items() if value != alpha}
    return weights, config


class FusedLoraLinear(LoraLinear):
    """PEFT's layer with fewer kernels in autocast: it casts its input once, and `addmm` adds the LoRA's part."""

    def forward(self, x, *args, **kwargs):
        adapter, *others = self.active_adapters
        is_plain = adapter in self.lora_A and adapter not in self.lora_variant and not (others or args or kwargs)
        if not is_plain or self.disable_adapters or self.merged or not torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        x = x.to(torch.get_autocast_dtype(x.device.type))
        output, down, up = self.base_layer(x), self.lora_A[adapter](x), self.lora_B[adapter].weight
        sum_of_both = torch.addmm(output.flatten(0, -2), down.flatten(0, -2), up.T, alpha=self.scaling[adapter])
        return sum_of_both.view_as(output)


def create_policy(args, unet, pretrained_lora):
    """The frozen U-Net with a LoRA in float32 as its adapter "default". A pretrained one gives the starting weights,
    and a frozen copy of it becomes the adapter "reference"."""
    unet.requires_grad_(False)
    options = {"r": args.rank, "lora_alpha": args.lora_alpha or args.rank, "init_lora_weights": "gaussian"}
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    weights, config = pretrained_lora or ({}, LoraConfig(target_modules=targets, **options))
    for adapter in (ncp_loss.REFERENCE_ADAPTER, "default") if weights else ("default",):
        try:
            unet.add_adapter(copy.deepcopy(config), adapter)
            cast_training_params(unet)  # PEFT gives the LoRA the U-Net's dtype, which would round the weights.
            result = set_peft_model_state_dict(unet, dict(weights), adapter_name=adapter)
            if result.unexpected_keys:
                raise InputError(f"the U-Net has no layer for {result.unexpected_keys[0]}")
        except (RuntimeError, ValueError) as error:
            name = f"--pretrained_lora_path {args.pretrained_lora_path}"
            raise InputError(f"{name} does not fit: {one_line(error)}") from error
    for layer in unet.modules():
        if type(layer) is LoraLinear:
            layer.__class__ = FusedLoraLinear
        elif isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # autocast does it
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.compile:
        # Each size of block is compiled with and without its adapter, gradients and autocast.
        torch._dynamo.config.recompile_limit = 64
        # Rounding as without compilation keeps the margin at exactly 0 while the LoRA changes nothing.
        unet.compile_repeated_blocks(options={"emulate_precision_casts": True})
    return unet


# Latents and embeddings


@torch.no_grad()
def encode_images(vae, pixel_values, batch_size):
    """Latents of images, the posterior's mode: `(N, 3, H, W)` in 0 to 255 to `(N, C, h, w)` in float32."""
    batches = (pixels.to(vae.device, vae.dtype) / 127.5 - 1 for pixels in pixel_values.split(batch_size))
    return torch.cat([vae.encode(pixels).latent_dist.mode() for pixels in batches]).float() * vae.config.scaling_factor


def tokenize(pipeline, name, captions):
    """The `input_ids` of captions, `(B, L)`, for the text encoder `name`."""
    tokenizer, text_encoder = getattr(pipeline, TEXT_ENCODERS[name]), getattr(pipeline, name)
    input_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    if torch.accelerator.is_available():
        input_ids = input_ids.pin_memory()  # A copy of other memory would wait for the device.
    return input_ids.to(text_encoder.device, non_blocking=True)


@torch.no_grad()
def encode_prompt(pipeline, captions):
    """Text embeddings of captions: `prompt_embeds` of shape `(B, L, D)`."""
    return {"prompt_embeds": pipeline.text_encoder(tokenize(pipeline, "text_encoder", captions))[0]}


def prompt_conditioning(prompt, batch, images_per_pair):
    """`encoder_hidden_states` of shape `(N, L, D)` for N images, and `added_cond_kwargs`, which is `None` here."""
    return prompt["prompt_embeds"].repeat(images_per_pair, 1, 1), None


# Noise, errors and the loss


def noise_batch(args, batch, pipeline, noise_scheduler):
    """Encodes a batch of pairs and adds each pair's noise at its timestep, to the winner and to the loser."""
    if args.encoded_data_dir is not None:
        latents, prompt = batch["latents"].float(), {name: value.float() for name, value in batch["prompt"].items()}
    else:
        latents = encode_images(pipeline.vae, batch["pixel_values"], args.vae_encode_batch_size)
        prompt = encode_prompt(pipeline, batch["caption"])
    images_per_pair = len(latents) // len(batch["noise"])
    conditioning = prompt_conditioning(prompt, batch, images_per_pair)
    timesteps = batch["timesteps"].repeat(images_per_pair)
    noise, variance_noise = (batch[name].repeat(images_per_pair, 1, 1, 1) for name in ("noise", "variance_noise"))
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = {"epsilon": noise, "sample": latents}[noise_scheduler.config.prediction_type]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    return ncp_loss.Denoising(noisy_latents, timesteps, target, *conditioning, variance_noise)


def predict(denoising, unet, policy, needs_reference):
    """Predictions of the policy and, if needed, of the reference, `(N, C, h, w)`. `unet` wraps `policy`."""
    ref_pred = None
    if needs_reference:
        with torch.no_grad(), ncp_loss.reference_model(policy):
            ref_pred = denoising.predict(policy)
    return denoising.predict(unet), ref_pred


def loss_options(args):
    names = ("loss_type", "sft_weight", "label_smoothing", "target_margin")
    return {"beta": args.beta_dpo, **{name: getattr(args, name) for name in names}}


def measure_loss(args, errors, batch):
    """The loss of a batch's pairs: of their winners alone if only these were read (sft)."""
    if len(errors.policy) == len(batch["timesteps"]):
        return errors.policy.mean()
    options = {"winner_probability": batch.get("winner_probability"), **loss_options(args)}
    return ncp_loss.preference_loss(*errors, **options).loss


def tabulate(batch, errors):
    """What metrics need of a batch's pairs, by name, each of shape `(B,)`."""
    table = {name: batch[name] for name in ("rows", "timesteps", "winner_probability") if name in batch}
    for name, values in (("error", errors.policy), ("ref_error", errors.reference)):
        if values is not None:
            table.update(zip((f"{name}_w", f"{name}_l"), values.detach().split(len(batch["rows"]))))
    return table


def summarize(args, table):
    """Means over the pairs of a table, by name."""
    names = ("error_w", "error_l", "ref_error_w", "ref_error_l", "winner_probability")
    return ncp_loss.preference_metrics(**{name: table.get(name) for name in names}, **loss_options(args))


@torch.no_grad()
def check_prediction(args, pairs, policy, pipeline, noise_scheduler):
    """Warns if the reference predicts worse than zero, as with another `prediction_type` than the model's."""
    timestep = pairs.timesteps[-math.ceil(len(pairs.timesteps) / 8)]  # Types differ most at large ones.
    stream = preference_pairs.pair_stream(pairs.rows, args.seed, 0, 2)
    batch = preference_pairs.collate_fn([pairs[(*key, timestep)] for key in stream])
    denoising = noise_batch(args, send_to_device(batch, policy.device), pipeline, noise_scheduler)
    with ncp_loss.reference_model(policy):
        ref_pred = denoising.predict(policy)
    error, error_of_zero = (ncp_loss.latent_error(pred, denoising.target).mean() for pred in (ref_pred, 0 * ref_pred))
    if error > error_of_zero:
        found = f"it errs by {error:.3g}, a prediction of zero by {error_of_zero:.3g}"
        kind = f"`prediction_type` {noise_scheduler.config.prediction_type} in its scheduler_config.json"
        logger.warning(f"--pretrained_model_name_or_path: {found}. Is {kind} right?")


def load_batches(accelerator, pairs, keys, batch_size):
    """Batches of this process's share of the pairs with these keys, on its device."""
    with accelerator.split_between_processes(keys) as own_keys:
        options = {"sampler": own_keys, "collate_fn": preference_pairs.collate_fn}
    for batch in torch.utils.data.DataLoader(pairs, batch_size, **options):
        yield send_to_device(batch, accelerator.device)


@torch.no_grad()
def measure_error_scale(args, accelerator, pairs, policy, pipeline, noise_scheduler, perception):
    """The error scale, from latent and perceptual margins under a small random change of the policy."""
    # Nothing can change at the first timestep.
    timesteps = pairs.timesteps[pairs.timesteps > 0] if len(pairs.timesteps) > 1 else pairs.timesteps
    generator, measured, start = torch.Generator().manual_seed(args.seed), [], time.monotonic()
    offset = torch.rand((), generator=generator).item()
    bar = tqdm(desc="Error scale", total=MAX_SCALE_PAIRS)
    with ncp_loss.perturbed_policy(policy, generator), bar:
        for first in range(0, MAX_SCALE_PAIRS, SCALE_BLOCK_SIZE):
            stream = preference_pairs.pair_stream(pairs.rows, args.seed, first, first + SCALE_BLOCK_SIZE)
            spread = preference_pairs.spread_timesteps(timesteps, first, SCALE_BLOCK_SIZE, offset)
            keys, block = [(*key, timestep) for key, timestep in zip(stream, spread)], []
            for batch in load_batches(accelerator, pairs, keys, SCALE_BATCH_SIZE):
                denoising = noise_batch(args, batch, pipeline, noise_scheduler)
                predictions, margins = predict(denoising, policy, policy, needs_reference=True), []
                for space in (ncp_loss.LatentSpace, perception):
                    errors = space.errors(denoising, *predictions)
                    change = errors.reference - errors.policy
                    margins.append(change if pairs.winner_only else torch.sub(*change.chunk(2)))
                block.append(torch.stack(margins, dim=1).cpu())
            measured += gather_object(block)
            bar.update(SCALE_BLOCK_SIZE)
            try:
                scale, standard_error = ncp_loss.error_scale(*torch.cat(measured).T)
            except ValueError as error:
                raise RuntimeError(f"Give --ncp_error_scale, it cannot be measured: {error}") from error
            if standard_error <= SCALE_STANDARD_ERROR:
                bar.total = bar.n
                break
    seconds, percent = time.monotonic() - start, 100 * standard_error
    logger.info(f"Measured the error scale to {percent:.0f} % on {first + SCALE_BLOCK_SIZE} pairs in {seconds:.0f} s")
    # With so few digits, the printed flag gives the very same run.
    return float(f"{scale:.4g}")


def create_perception(args, accelerator, pairs, policy, pipeline, noise_scheduler, saved, state):
    """The space in which errors are measured. Its error scale is given, the checkpoint's, or measured."""
    if args.loss_space == "latent":
        return ncp_loss.LatentSpace
    options = {"layer": args.ncp_layer, "target_timestep": args.ncp_timestep, "probe_rms": args.ncp_probe_rms}
    perception = ncp_loss.NoiseConditionedPerception(policy, noise_scheduler, **options)
    if args.ncp_error_scale != "auto":
        scale = args.ncp_error_scale
    elif saved and not find_changes(args, saved, SCALE_ARGUMENTS):
        scale = saved["error_scale"]
    else:
        scale = measure_error_scale(args, accelerator, pairs, policy, pipeline, noise_scheduler, perception)
    perception.error_scale = state["error_scale"] = scale
    logger.info(f"Perceptual errors are scaled by --ncp_error_scale {scale}")
    return perception


def create_accelerator(args):
    """Sets up accelerate, logging, the output folder and the repository on the hub."""
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(Path(args.output_dir, args.logging_dir)),
        # The schedule counts optimization steps. accelerate would step it once per process.
        step_scheduler_with_optimizer=False,
    )
    if (steps := accelerator.gradient_accumulation_steps) != args.gradient_accumulation_steps:
        flag = f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}"
        raise InputError(f"{flag}, but accelerate's configuration or environment says {steps}.")
    args.mixed_precision = accelerator.mixed_precision
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # It logs five lines per checkpoint.
    logger.info(accelerator.state, main_process_only=False)
    if not accelerator.is_local_main_process:
        for library in ("datasets", "diffusers", "preference_pairs", "transformers"):
            logging.getLogger(library).setLevel(logging.ERROR)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        if args.push_to_hub:
            name = args.hub_model_id or Path(args.output_dir).resolve().name
            repo = create_repo(name, private=args.hub_private_repo or None, exist_ok=True, token=args.hub_token)
            args.hub_model_id = repo.repo_id
            if file_exists(repo.repo_id, WEIGHTS_NAME, token=args.hub_token):
                logger.warning(f"--hub_model_id {repo.repo_id} holds a LoRA already, which the upload will replace")
    return accelerator


def set_run_seed(args, saved):
    """If no seed is given, takes the checkpoint's or draws one, the same on every process."""
    if args.seed is None:
        args.seed = saved["arguments"]["seed"] if saved else broadcast_object_list([torch.seed() % 2**32])[0]
        logger.info(f"Drew --seed {args.seed}")
    torch.manual_seed(args.seed)


def create_state(args, accelerator, pairs, saved):
    """The contents of a checkpoint's training_state.json. Sets `--max_train_steps` if only epochs are given."""
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(pairs.rows) / pairs_per_step)
    return {
        "format": 2,
        "global_step": saved.get("global_step", 0),
        "next_pair": saved.get("next_pair", 0),  # its number in the stream
        "pairs_per_step": pairs_per_step,
        "validated_step": saved.get("validated_step"),
        "dataset": pairs.source,
        "error_scale": None,
        "num_processes": accelerator.num_processes,
        "arguments": {name: value for name, value in vars(args).items() if name != "hub_token"},
        "data": preference_pairs.digest_of_pairs(pairs.rows, *pairs.columns(), pairs.images),
        "models": preference_pairs.digest_models(args),
    }


def create_optimizer(args, policy, pairs_per_step):
    """AdamW over the LoRA, and the schedule of its learning rate."""
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    options = {"lr": args.learning_rate * (pairs_per_step if args.scale_lr else 1), "eps": args.adam_epsilon}
    options |= {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.adam_weight_decay}
    optimizer = optimizer_class([weight for weight in policy.parameters() if weight.requires_grad], **options)
    if args.lr_scheduler == "constant" and args.lr_warmup_steps not in (0, 500):
        logger.warning("--lr_scheduler constant ignores --lr_warmup_steps; constant_with_warmup does not")
    elif args.lr_scheduler != "constant" and args.lr_warmup_steps >= args.max_train_steps:
        logger.warning(f"--lr_warmup_steps {args.lr_warmup_steps} covers all steps: --learning_rate is never reached")
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    shape = {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **steps, **shape)


# Checkpoints


def find_changes(args, saved, names):
    """Differences from a checkpoint's arguments. Flags that did not exist then had their default."""
    default, before = create_parser().get_default, saved["arguments"]
    values = [(name, getattr(args, name), before.get(name, default(name))) for name in names]
    return [f"--{name} is {now!r}, but was {then!r}" for name, now, then in values if now != then]


def read_state(checkpoint):
    """A checkpoint's training_state.json, unless it is of an older version."""
    state = json.loads((checkpoint / STATE_NAME).read_bytes())
    if "format" not in state:
        names = ("timestep_weighting", "sdpo_safeguard", "pretrained_lora_path")
        used = [f"--{name}" for name in names if state["arguments"].get(name) not in (None, False, "none")]
        version = f"an older version with {', '.join(used)}" if used else "an older version"
        raise InputError(f"{checkpoint} is of {version}: finish its run with that version.")
    return state


class Checkpoints:
    """The folders `checkpoint-N` in `--output_dir`. A new run has no `checkpoint` and no `saved` state of one."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator, self.folder = args, accelerator, Path(args.output_dir)
        if accelerator.is_main_process:
            # The system frees it when the process ends.
            self.lock = filelock.FileLock(self.folder / ".lock", is_singleton=True)
            try:
                self.lock.acquire(timeout=0)
            except filelock.Timeout as error:
                raise InputError(f"--output_dir {self.folder}: another run writes to it now.") from error
        # Machines need not share the folder, but must have the checkpoint that the main process chooses.
        chosen = self.choose() if accelerator.is_main_process else None
        chosen, saved = self.checkpoint, self.saved = broadcast_object_list([chosen, chosen and read_state(chosen)])
        has_it = chosen is None or (chosen / STATE_NAME).is_file() and read_state(chosen) == saved
        if missing := [rank for rank, has in enumerate(gather_object([has_it])) if not has]:
            advice = "copy it to their machines, or share --output_dir"
            raise InputError(f"Process 0 resumes from {chosen}, which processes {missing} do not have: {advice}.")

    def find(self):
        """Complete checkpoints in ascending order of their steps."""
        folders = (path.parent for path in self.folder.glob(f"checkpoint-*/{STATE_NAME}"))
        folders = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)]
        return sorted(folders, key=lambda folder: int(folder.name[11:]))

    def choose(self):
        """The checkpoint of `--resume_from_checkpoint`; `None` for a new run."""
        checkpoints, wanted = self.find(), self.args.resume_from_checkpoint
        if wanted in (None, "latest"):
            found = checkpoints[-1] if checkpoints and wanted else None
        else:
            places = [Path(wanted), self.folder / wanted]
            found = next((folder for folder in places if (folder / STATE_NAME).is_file()), None)
            if found is None:
                raise InputError(f"--resume_from_checkpoint: there is no checkpoint {places[0]}, nor {places[1]}.")
        # Later checkpoints are in the way; all are if the run is new or resumes from another folder.
        own = [folder.resolve() for folder in checkpoints]
        num_kept = own.index(found.resolve()) + 1 if found and found.resolve() in own else 0
        others = [folder.name for folder in own[num_kept:]]
        results = {} if own else {"the LoRA": WEIGHTS_NAME, "README.md": "README.md"}
        others += [name for name, file in results.items() if (self.folder / file).is_file()][:1]
        if others:
            names = " to ".join(dict.fromkeys((others[0], others[-1])))
            advice = "give another folder, or --resume_from_checkpoint latest" if wanted is None else "move them first"
            raise InputError(f"--output_dir {self.folder} holds {names} of another run or later steps: {advice}.")
        if wanted == "latest":
            for path in set(self.folder.glob("*checkpoint-*")) - set(checkpoints):
                logger.warning(f"{path} is no complete checkpoint and is passed over")
            if found is None:
                logger.info(f"There is no checkpoint in {self.folder} yet: starting anew")
        return found

    def check(self, state):
        """Refuses a run whose `state` differs between processes or from its checkpoint."""
        args, checkpoint, saved = self.args, self.checkpoint, self.saved
        inputs = gather_object([(state["data"], state["models"])])
        if others := [rank for rank, other in enumerate(inputs) if other != inputs[0]]:
            raise InputError(f"Processes {others} have other pairs or models than process 0: give all the same files.")
        if checkpoint is None:
            return
        if args.max_train_steps < saved["global_step"]:
            raise InputError(f"--max_train_steps is {args.max_train_steps}, but {checkpoint} is further on.")
        # Schedules other than the constant ones depend on the last step.
        names = LEARNING_ARGUMENTS + ([] if args.lr_scheduler.startswith("constant") else ["max_train_steps"])
        if args.ncp_error_scale in ("auto", saved["error_scale"]):
            names.remove("ncp_error_scale")
        others = sorted(dict(state["models"].items() ^ saved.get("models", {}).items()))
        if not others:
            # The same files in another place are the same model.
            names = [name for name in names if name not in (*preference_pairs.MODEL_ARGUMENTS, "pretrained_lora_path")]
        changes = find_changes(args, saved, names)
        if others and "models" in saved:
            changes.append(f"the files of {', '.join(others)} were others")
        if (now := state["pairs_per_step"]) != (before := saved["pairs_per_step"]):
            changes.append(f"--train_batch_size x --gradient_accumulation_steps x processes is {now}, was {before}")
            fitting, rest = divmod(before, args.train_batch_size * state["num_processes"])
            changes[-1] += "" if rest else f" (--gradient_accumulation_steps {fitting} fits)"
        data, data_before = state["data"], saved.get("data", {})
        if {**data, **data_before} != {**data_before, **data}:
            changes.append(f"the data are {data['num_pairs']} pairs, but were {data_before['num_pairs']} others")
        if changes:
            differences = f"{'; '.join(changes)} in {checkpoint}"
            if not args.allow_resume_changes:
                raise InputError(f"{differences}. Give the same values, or --allow_resume_changes.")
            logger.warning(differences)

    def load(self, policy):
        """Resumes, if there is a checkpoint."""
        self.policy = policy
        # Without these hooks accelerate would save and load the whole U-Net as well.
        self.accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        self.accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        if self.checkpoint is None:
            return
        self.accelerator.load_state(str(self.checkpoint))
        # accelerate restores its count of batches, of which a step may now have another number.
        self.accelerator.step = 0
        lora = safetensors.torch.load_file(self.checkpoint / WEIGHTS_NAME)
        lora = convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in lora.items()})
        result = set_peft_model_state_dict(policy, lora)
        missing = [name for name in result.missing_keys if ".lora_" in name and ".reference." not in name]
        if wrong := missing + result.unexpected_keys:
            raise InputError(f"The LoRA in {self.checkpoint} does not fit: {wrong}.")
        logger.info(f"Resumed from {self.checkpoint}")

    def save(self, state, signals):
        """Writes `checkpoint-N`, which gets its name when it is on the disk, and removes those over the limit."""
        folder = self.folder / f"checkpoint-{state['global_step']}"
        incomplete = folder.with_name(f"incomplete-{folder.name}")
        with signals.others_wait():
            # The other processes have nothing that a resume needs.
            if (folder / STATE_NAME).is_file() or not self.accelerator.is_main_process:
                return
            try:
                self.accelerator.save_state(str(incomplete))
                self.save_lora(incomplete)
                (incomplete / STATE_NAME).write_text(json.dumps(state, indent=2))
                for path in incomplete.rglob("*"):
                    synchronize(path)
                if folder.exists():  # It is not complete: the run has passed over it.
                    folder.rename(folder.with_name(f"passed-over-{folder.name}"))
                incomplete.rename(folder)
            except (OSError, RuntimeError, safetensors.SafetensorError) as error:
                shutil.rmtree(incomplete, ignore_errors=True)
                whole = ", ".join(path.name for path in self.find()) or "none"
                advice = f"Whole checkpoints: {whole}. Make room, or resume in another --output_dir."
                raise RuntimeError(f"{folder} could not be saved: {error}. {advice}") from error
            if self.args.checkpoints_total_limit is not None:
                for old in self.find()[: -self.args.checkpoints_total_limit]:
                    shutil.rmtree(old)
            logger.info(f"Saved {folder}")

    def save_lora(self, folder):
        lora = get_peft_model_state_dict(self.policy).items()
        # `convert_state_dict_to_diffusers` renames attention alone. diffusers does not load a mixture of names.
        lora = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for name, value in lora}
        metadata = self.policy.peft_config["default"].to_dict()
        PIPELINE_CLASS.save_lora_weights(folder, unet_lora_layers=lora, unet_lora_adapter_metadata=metadata)
        # safetensors 0.8 lets the owner alone read it, whatever the umask.
        os.umask(umask := os.umask(0))
        Path(folder, WEIGHTS_NAME).chmod(0o666 & ~umask)


def synchronize(path):
    """Waits until a file is on the disk, if the file system can."""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            # A full or broken disk gives another error.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise


# Reports


class Monitor:
    """Logs the metrics of every step, one step late, when the device has computed them, and warns of problems."""

    def __init__(self, args, accelerator, state):
        self.args, self.accelerator, self.state = args, accelerator, state
        # Logs are uploaded, without local paths. TensorBoard refuses lists.
        settings = {**state["arguments"], "ncp_error_scale": state["error_scale"], "timesteps": str(args.timesteps)}
        settings = {name: public_name(value) if isinstance(value, str) else value for name, value in settings.items()}
        # TensorBoard leaves out what a stopped run logged of the steps that come again.
        options = {"tensorboard": {"purge_step": state["global_step"] + 1}}
        accelerator.init_trackers(args.tracker_name, settings, options)
        logger.info(f"Training for {args.max_train_steps} steps at --resolution {args.resolution}")
        self.progress_bar = tqdm(total=args.max_train_steps, initial=state["global_step"], desc="Steps")
        self.num_skipped, self.skipped_steps, self.flat_steps, self.pending = 0, 0, 0, None
        self.start, self.recent = time.monotonic(), collections.deque(maxlen=50)  # of steps, for the progress bar

    def is_due(self, every):
        """Whether what is done every so many steps, and after the last one, is done now."""
        step = self.state["global_step"]
        return step == self.args.max_train_steps or step % every == 0

    def report_skipped_pairs(self, reasons):
        for reason in reasons:
            self.num_skipped += 1
            logger.warning(f"{reason}. The next pair is taken ({self.num_skipped} so far)", main_process_only=False)

    def track(self, function, *values, **options):
        """Calls a function of the trackers. If it fails, the run goes on."""
        try:
            function(*values, **options)
        except Exception as error:  # trackers raise many kinds
            logger.warning(f"--report_to {self.args.report_to} failed: {one_line(error)}")

    def record(self, tables, grad_norm, learning_rate):
        """Gathers the tables of a step's batches from all processes, and logs the step before."""
        columns = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
        columns["grad_norm"] = grad_norm.expand(len(columns["rows"]))
        values = self.accelerator.gather(torch.stack([column.float() for column in columns.values()], dim=1))
        # Waiting for the copy here would leave the device without work.
        values = values.to("cpu", non_blocking=True)
        copied = torch.accelerator.current_stream().record_event() if grad_norm.device.type != "cpu" else None
        self.flush()
        self.pending = self.state["global_step"], learning_rate, dict(zip(columns, values.T)), copied

    def flush(self):
        if self.pending is None:
            return
        (step, learning_rate, table, copied), self.pending = self.pending, None
        if copied is not None:
            copied.synchronize()
        metrics = {**summarize(self.args, table), "grad_norm": table["grad_norm"][0].item(), "lr": learning_rate}
        self.check_finite(step, metrics, table["rows"].int().tolist())
        self.recent.append(metrics)
        shown = metrics.keys() & {"loss", "implicit_accuracy", "margin"}
        means = {name: np.mean([step[name] for step in self.recent]) for name in shown}
        self.progress_bar.set_postfix(**means, refresh=False)
        self.progress_bar.update()
        self.track(self.accelerator.log, metrics, step=step)
        self.flat_steps = self.flat_steps + 1 if metrics.get("logit_spread", math.inf) < 0.01 else 0
        if self.flat_steps == 100:
            advice = f"Raise --beta_dpo {self.args.beta_dpo}: nothing holds the policy near the reference."
            logger.warning(f"The logits' spread was below 0.01 for 100 steps. {advice}")

    def check_finite(self, step, metrics, rows):
        # In fp16 the gradient overflows now and then, and the loss scaler shrinks. Below 1 it no longer helps.
        scaled = self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() >= 1
        if math.isfinite(metrics["loss"]) and (math.isfinite(metrics["grad_norm"]) or scaled):
            self.skipped_steps = 0
            return
        self.skipped_steps += 1
        problem = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, rows {rows}"
        if self.skipped_steps > self.args.max_skipped_steps:
            limit = f"--max_skipped_steps {self.args.max_skipped_steps} allows no more; checkpoints are intact"
            raise RuntimeError(f"Step {step} is not finite: {problem}. {limit}.")
        logger.warning(f"Step {step} is not finite: {problem}. It is skipped.")

    def report_end(self):
        args, duration = self.args, timedelta(seconds=round(time.monotonic() - self.start))
        self.progress_bar.close()
        memory = f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""
        logger.info(f"Trained for {duration}{memory}")
        if args.num_eval_pairs is not None:
            rows = read_held_out(args)
            best = min(rows, key=lambda row: float(row["loss"]))["step"]
            kept = Path(args.output_dir, f"checkpoint-{best}").is_dir()
            logger.info(f"Held-out pairs had the lowest loss at step {best}, {'a' if kept else 'no'} checkpoint")
            error, drift = float(rows[-1]["error_w"]), float(rows[-1]["drift_w"])
            logger.info(f"The winners' error has drifted by {drift / (error - drift):.1%} of the reference's")
        names = shlex.join([args.pretrained_model_name_or_path, "--lora_weights", args.output_dir])
        command = f"python tools/eval_win_rate.py --prompts_file prompts.txt --pretrained_model_name_or_path {names}"
        logger.info(f"The LoRA is in {args.output_dir}. To compare it with the base:\n{command}")


@torch.no_grad()
def measure_held_out(args, accelerator, pairs, policy, pipeline, noise_scheduler, perception, monitor, signals):
    """Measures held-out pairs in latent space and that of training, by timestep range, for trackers and `eval.csv`."""
    spaces = {"latent": ncp_loss.LatentSpace, args.loss_space: perception}
    tables, metrics, lines, step = {space: [] for space in spaces}, {}, [], monitor.state["global_step"]
    # A pair has the same timestep in every measurement.
    timesteps = preference_pairs.spread_timesteps(pairs.timesteps, 0, len(pairs.rows), 0.5)
    keys = [(0, row, timestep) for row, timestep in zip(pairs.rows, timesteps)]
    batches = load_batches(accelerator, pairs, keys, args.train_batch_size)
    for _ in range(math.ceil(len(keys) / accelerator.num_processes / args.train_batch_size)):
        batch = next(batches, None)
        if signals.agreed():
            return
        if batch is None:  # The last processes may have one batch less.
            continue
        monitor.report_skipped_pairs(batch["skipped"])
        denoising = noise_batch(args, batch, pipeline, noise_scheduler)
        predictions = predict(denoising, policy, policy, needs_reference=True)
        for space, measured_in in spaces.items():
            errors = measured_in.errors(denoising, *predictions)
            tables[space].append(send_to_device(tabulate(batch, errors), "cpu"))
    ranges = {"all": pairs.timesteps}
    ranges |= {f"{part[0]}-{part[-1]}": part for part in pairs.timesteps.tensor_split(4) if len(part)}
    for space, parts in tables.items():
        parts = gather_object(parts)
        table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, timesteps in ranges.items():
            within = torch.isin(table["timesteps"], timesteps)
            if not within.any():
                continue
            summary = summarize(args, {column: values[within] for column, values in table.items()})
            metrics.update((f"eval/{space}/{metric}/{name}", summary[metric]) for metric in EVAL_METRICS)
            values = [step, space, name, within.sum().item(), *(summary[metric] for metric in EVAL_METRICS)]
            lines.append(",".join(map(str, values)))
    monitor.track(accelerator.log, metrics, step=step)
    accuracy = metrics[f"eval/{args.loss_space}/implicit_accuracy/all"]
    logger.info(f"Held-out pairs at step {step}: implicit accuracy {accuracy:.3f}")
    if accelerator.is_main_process:
        path = Path(args.output_dir, "eval.csv")
        head = ",".join(["step", "space", "timesteps", "pairs", *EVAL_METRICS])
        earlier = path.read_text().splitlines()[1:] if path.is_file() else []
        earlier = [line for line in earlier if int(line.split(",")[0]) < step]
        incomplete = path.with_name(f"incomplete-{path.name}")
        incomplete.write_text("\n".join([head, *earlier, *lines, ""]))
        incomplete.replace(path)


def read_held_out(args):
    """The rows of `eval.csv` in the space of training, at all timesteps together."""
    rows = csv.DictReader(Path(args.output_dir, "eval.csv").read_text().splitlines())
    return [row for row in rows if (row["space"], row["timesteps"]) == (args.loss_space, "all")]


@torch.no_grad()
def log_validation(args, accelerator, pipeline, step, monitor, signals):
    """Draws `validation/step-N.png`, always from the same noise, and `before_after.png` of step 0 and this one."""
    folder, vae = Path(args.output_dir, "validation"), pipeline.vae
    if not (args.run_validation and accelerator.is_main_process) or signals.stop:
        return
    logger.info(f"Drawing {args.num_validation_images} validation images at step {step}")
    options = {"height": args.resolution, "width": args.resolution, "num_inference_steps": 25, "output_type": "latent"}
    decoded = []
    # Tiles keep drawing from raising the peak memory.
    vae.enable_tiling()
    for index in range(args.num_validation_images):
        if signals.stop:
            return
        generator = torch.Generator(accelerator.device).manual_seed(args.seed + index)
        latents = pipeline(args.validation_prompt, generator=generator, **options).images
        # Pipelines decode in the dtype of the latents, in which SDXL's VAE overflows.
        decoded.append(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample)
    vae.disable_tiling()
    decoded = torch.cat(decoded)
    if not decoded.isfinite().all():
        flags = f"--validation_prompt {args.validation_prompt!r} with --mixed_precision {args.mixed_precision}"
        logger.warning(f"{flags} gives images that are not finite at step {step}: none is saved")
        return
    images = pipeline.image_processor.postprocess(decoded)
    folder.mkdir(exist_ok=True)
    make_image_grid(images, rows=1, cols=len(images)).save(folder / f"step-{step}.png")
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            monitor.track(tracker.log_images, {"validation": np.stack(images)}, step=step, **layout)
    if not (folder / "step-0.png").is_file():  # The reference's images were not finite.
        return
    before_after = [Image.open(folder / f"step-{number}.png") for number in (0, step)]
    style = {"fill": "white", "stroke_fill": "black", "stroke_width": 1, "font_size": args.resolution / 16}
    for image, title in zip(before_after, ("before training", f"after {step} steps")):
        ImageDraw.Draw(image).text((4, 4), title, **style)
    make_image_grid(before_after, rows=2, cols=1).save(folder / "before_after.png")


def validate(args, accelerator, pairs, policy, pipeline, noise_scheduler, perception, monitor, signals):
    """Measures held-out pairs and draws images. What a stop signal breaks off is done when the run is resumed."""
    step = monitor.state["global_step"]
    if pairs is not None:
        measure_held_out(args, accelerator, pairs, policy, pipeline, noise_scheduler, perception, monitor, signals)
    with signals.others_wait():
        # An earlier run may have left it.
        if step == 0 or not Path(args.output_dir, "validation", "step-0.png").is_file():
            with ncp_loss.reference_model(policy):
                log_validation(args, accelerator, pipeline, 0, monitor, signals)
        if 0 < step < args.max_train_steps:  # The last images are drawn after the LoRA is saved.
            log_validation(args, accelerator, pipeline, step, monitor, signals)
    if not signals.stop:
        monitor.state["validated_step"] = step


def public_name(name):
    """A hub id as it is; of a folder only its last part."""
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) or name.count("/") > 1 else name


def describe_run(state):
    """Metadata of the LoRA's files and lines of the model card, from a run's `training_state.json`."""
    arguments = state["arguments"]
    return {
        "ss_sd_model_name": public_name(arguments["pretrained_model_name_or_path"]),
        "ss_steps": str(state["global_step"]),
        "ncp_loss": f"{arguments['loss_type']} in {arguments['loss_space']} space",
        "ncp_error_scale": str(state["error_scale"]),
        "ncp_beta_dpo": f"{arguments['beta_dpo']:g}",
        "ncp_dataset": public_name(state.get("dataset") or arguments["dataset_name"] or arguments["train_data_dir"]),
        "ncp_pretrained_lora": public_name(arguments.get("pretrained_lora_path") or "none"),
    }


def save_kohya_lora(path, lora, alphas, description):
    """Writes a U-Net's LoRA in kohya's format, for ComfyUI, AUTOMATIC1111 and Forge, and returns its metadata, with
    `description`. `lora` has PEFT's names, `unet.….lora_A.weight`; `alphas` are by layer."""
    kohya = convert_state_dict_to_kohya({name: value.cpu().contiguous() for name, value in lora.items()})
    # It takes every alpha to be the rank.
    kohya |= {f"lora_unet_{layer.replace('.', '_')}.alpha": torch.tensor(float(alphas[layer])) for layer in alphas}
    ranks = {len(value) for name, value in kohya.items() if name.endswith(".lora_down.weight")}
    width = next((value.shape[1] for name, value in kohya.items() if name.endswith("attn2_to_k.lora_down.weight")), 0)
    values = {"dim": ranks, "alpha": {*alphas.values()}}
    network = {f"ss_network_{name}": f"{min(all):g}" if len(all) == 1 else "Dynamic" for name, all in values.items()}
    # AUTOMATIC1111 takes a LoRA without a version for SD 1.x's, and hides those of other models.
    version = KOHYA_VERSIONS.get(width, "unknown")
    network |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    metadata = {"format": "pt", "ss_network_module": "networks.lora", **network, **description}
    incomplete = path.with_name(f"incomplete-{path.name}")
    incomplete.write_bytes(safetensors.torch.save(kohya, metadata))
    incomplete.replace(path)
    return metadata


def launch_command(args, accelerator, name=str):
    """The command of this run, without its checkpoint and secrets; paths by `name`."""
    parser, words = create_parser(), [name(sys.argv[0])]
    for flag, value in vars(args).items():
        if flag not in ("resume_from_checkpoint", "hub_token") and value != parser.get_default(flag):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(name(str(value)) for value in values)]
    return f"accelerate launch --num_processes {accelerator.num_processes} {shlex.join(words)}"


def save_model_card(args, accelerator, state):
    """Writes README.md."""
    about, output_dir = describe_run(state), Path(args.output_dir)

    def table(head, *rows):
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))

    settings = {name.removeprefix("ncp_"): value for name, value in about.items() if name.startswith("ncp_")}
    names = ("max_train_steps", "learning_rate", "resolution", "mixed_precision", "seed")
    settings |= {"pairs per step": state["pairs_per_step"], **{name: getattr(args, name) for name in names}}
    picture, held_out = "", ""
    if (output_dir / "validation" / "before_after.png").is_file():
        picture = f"![{args.validation_prompt}, before and after](validation/before_after.png)\n\n"
    if args.num_eval_pairs is not None:
        rows = [[row["step"], *(f"{float(row[name]):.3g}" for name in EVAL_METRICS)] for row in read_held_out(args)]
        held_out = f"On held-out pairs:\n\n{table(('step', *EVAL_METRICS), *rows)}\n\n"
    base_model = about["ss_sd_model_name"]
    repo_id = args.hub_model_id or output_dir.resolve().name
    tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "ncp-dpo"]
    on_hub = None if os.path.exists(args.pretrained_model_name_or_path) else base_model
    card = f"""---
{ModelCardData(library_name="diffusers", base_model=on_hub, tags=tags).to_yaml()}
---

# {repo_id}

A LoRA for `{base_model}`, trained by {about["ncp_loss"]} on the preference pairs of `{about["ncp_dataset"]}`
([Noise-Conditioned Perception](https://huggingface.co/papers/2406.17636)).

{picture}{held_out}{table(("setting", "value"), *settings.items())}

`DiffusionPipeline.from_pretrained("{base_model}").load_lora_weights("{repo_id}")` loads it. It was trained by

    {launch_command(args, accelerator, public_name)}
"""
    ModelCard(card).save(output_dir / "README.md")


def finish(args, accelerator, policy, state, monitor):
    """Writes the LoRA for other programs and the model card, and uploads all."""
    lora = {f"unet.{name}": value for name, value in get_peft_model_state_dict(policy).items()}
    layers = policy.named_modules()
    alphas = {name: layer.lora_alpha["default"] for name, layer in layers if isinstance(layer, BaseTunerLayer)}
    save_kohya_lora(Path(args.output_dir, KOHYA_WEIGHTS_NAME), lora, alphas, describe_run(state))
    save_model_card(args, accelerator, state)
    monitor.report_end()
    if args.push_to_hub:
        files = [WEIGHTS_NAME, KOHYA_WEIGHTS_NAME, "README.md", "eval.csv", "validation/*.png"]
        files.append(f"{args.logging_dir}/**/events*")
        options = {"allow_patterns": files, "commit_message": "End of training", "token": args.hub_token}
        try:
            upload_folder(repo_id=args.hub_model_id, folder_path=args.output_dir, **options)
        except Exception as error:
            command = shlex.join(["hf", "upload", args.hub_model_id, args.output_dir, ".", "--include", *files])
            problem = f"--push_to_hub failed: {one_line(error)}. The LoRA is in {args.output_dir}"
            raise RuntimeError(f"{problem}. To repeat the upload alone: {command}") from error


# Training


class StopSignals:
    """Lets signals and the launcher's death stop the run before its next batch. A second signal ends it at once."""

    def __init__(self, args, accelerator):
        self.stop, self.number, self.time, self.group = False, signal.SIGTERM, None, None
        if accelerator.num_processes > 1:
            # Without the device, which would have to finish its work first.
            self.group = torch.distributed.new_group(timeout=timedelta(seconds=args.ddp_timeout), backend="gloo")
        # `nohup` has SIGHUP ignored.
        handled = (number for number in preference_pairs.STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
        self.handlers = {number: signal.signal(number, self.receive) for number in handled}
        if sys.platform == "linux" and {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
            ctypes.CDLL(None).prctl(1, signal.SIGUSR2)  # PR_SET_PDEATHSIG
            if os.getppid() != LAUNCHER:
                self.receive(signal.SIGUSR2)

    def receive(self, number, frame=None):
        if self.time is None:
            self.stop, self.number, self.time = True, number, time.monotonic()
            os.write(2, b"\nStopping after this batch\n")  # `print` may be interrupted itself.
        # A launcher may pass on a signal that the terminal has sent as well.
        elif time.monotonic() - self.time > 2 and number != signal.SIGUSR2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def exchange(self, works):
        """Whether a process still works while the others wait. `stop` becomes the same on all."""
        # Not `stop`: a signal may come during the exchange, whose result replaces it. The next one still tells of it.
        flags = torch.tensor([self.time is not None, works], dtype=torch.int)
        if self.group is not None:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, self.group)
        self.stop, works = map(bool, flags.tolist())
        return works

    def agreed(self):
        """Whether a process was told to stop. Waits for all processes, and all get the same answer."""
        while self.exchange(works=False):
            pass
        return self.stop

    @contextlib.contextmanager
    def others_wait(self):
        """The other processes wait for this block, longer than `--ddp_timeout` if need be."""
        finished = threading.Event()

        def tell_others():
            while self.group is not None and not finished.wait(1):
                self.exchange(works=True)

        thread = threading.Thread(target=tell_others)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()
        self.agreed()

    def release(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def main(args):
    accelerator = create_accelerator(args)
    # Mistakes are found before a model is loaded.
    noise_scheduler, vae_config, timesteps = check_checkpoint(args)
    checkpoints = Checkpoints(args, accelerator)
    set_run_seed(args, checkpoints.saved)
    lora = load_pretrained_lora(args)
    winner_only = args.loss_type == "sft" and args.preference_probability_column is None
    pairs, eval_pairs = preference_pairs.open_pairs(args, vae_config, timesteps, winner_only)
    state = create_state(args, accelerator, pairs, checkpoints.saved or {})
    checkpoints.check(state)

    pipeline = load_pipeline(args, accelerator)
    policy = create_policy(args, pipeline.unet, lora)
    pairs_per_step = state["pairs_per_step"]
    optimizer, lr_scheduler = create_optimizer(args, policy, pairs_per_step)
    end = state["next_pair"] + (args.max_train_steps - state["global_step"]) * pairs_per_step
    dataloader = preference_pairs.create_dataloader(args, pairs, state["next_pair"], end)
    # Gradients are averaged through `unet`. `policy` is the model in it, and the reference and the encoder too.
    unet, optimizer, lr_scheduler, dataloader = accelerator.prepare(policy, optimizer, lr_scheduler, dataloader)
    checkpoints.load(policy)
    models = {"policy": policy, "pipeline": pipeline, "noise_scheduler": noise_scheduler}
    check_prediction(args, pairs, **models)
    perception = create_perception(args, accelerator, pairs, **models, saved=checkpoints.saved, state=state)
    monitor, signals = Monitor(args, accelerator, state), StopSignals(args, accelerator)
    validation = {**models, "perception": perception, "monitor": monitor, "signals": signals}
    is_validated = state["validated_step"] == state["global_step"] and Path(args.output_dir, "eval.csv").is_file()
    if monitor.is_due(args.validation_steps) and not is_validated:
        validate(args, accelerator, eval_pairs, **validation)

    needs_reference, tables = ncp_loss.LOSSES[args.loss_type].needs_reference, []
    unet.train()
    for batch in dataloader:
        if signals.agreed():
            break
        monitor.report_skipped_pairs(batch["skipped"])
        with accelerator.accumulate(unet):
            denoising = noise_batch(args, batch, pipeline, noise_scheduler)
            errors = perception.errors(denoising, *predict(denoising, unet, policy, needs_reference))
            accelerator.backward(measure_loss(args, errors, batch))
            tables.append(tabulate(batch, errors))
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
                # With --max_skipped_steps 0 the run ends before it saves such a step.
                if args.max_skipped_steps > 0 and not grad_norm.isfinite():
                    optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        state["global_step"] += 1
        state["next_pair"] += pairs_per_step
        monitor.record(tables, grad_norm, lr_scheduler.get_last_lr()[0])
        tables.clear()
        if monitor.is_due(args.validation_steps):
            monitor.flush()
            validate(args, accelerator, eval_pairs, **validation)
        if monitor.is_due(args.checkpointing_steps):
            monitor.flush()
            checkpoints.save(state, signals)

    if stops := signals.agreed():  # The gradients of an unfinished step are dropped.
        monitor.flush()
        checkpoints.save(state, signals)
    # A wrapped model that outlives its process group destroys it with Python's lock held, and gloo's threads hang.
    unet, optimizer, lr_scheduler = accelerator.free_memory(unet, optimizer, lr_scheduler)
    if stops:
        monitor.track(accelerator.end_training)
        command = f"{launch_command(args, accelerator)} --resume_from_checkpoint latest"
        logger.info(f"Stopped by {signal.Signals(signals.number).name}. To go on:\n{command}")
        sys.exit(128 + signals.number)
    signals.release()
    if accelerator.is_main_process:
        checkpoints.save_lora(args.output_dir)
        log_validation(args, accelerator, pipeline, args.max_train_steps, monitor, signals)
        finish(args, accelerator, policy, state, monitor)
    monitor.track(accelerator.end_training)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, ImportError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error, 1000)}", file=sys.stderr)
        sys.exit(2)
