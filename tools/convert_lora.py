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

"""Converts a U-Net's LoRA from Diffusers' format to that of kohya's scripts, for ComfyUI, AUTOMATIC1111 and Forge.

    python tools/convert_lora.py --lora_weights ncp-dpo-sd15

writes ncp-dpo-sd15/pytorch_lora_weights_kohya.safetensors. Its alpha is the one that the LoRA was trained with; its metadata say
what it was trained on and how, if the checkpoint that holds the same LoRA lies beside it. SDXL's layers are called as in
Diffusers, which these three map as well; sd-scripts itself has other names for them.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

import safetensors.torch
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from diffusers.utils import convert_unet_state_dict_to_peft


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_ncp_dpo_sd15 import STATE_NAME, WEIGHTS_NAME, Checkpoints  # noqa: E402


# Where save_lora_weights keeps PEFT's configuration.
ADAPTER_METADATA = "lora_adapter_metadata"
# What kohya's scripts call base models, by the width of their text embeddings.
BASE_MODEL_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


# To kohya's format


def kohya_state_dict(state_dict, lora_alpha=None):
    """
    A U-Net's LoRA in diffusers' format, `unet.….lora.down.weight` and so on, by the names of kohya's scripts.

    The layer `unet.mid_block.….to_out.0` becomes `lora_unet_mid_block_…_to_out_0`: `lora_unet_`, then its path in diffusers'
    U-Net with underscores for dots. Each has a `.lora_down.weight` of shape `(rank, in)`, a `.lora_up.weight` of shape
    `(out, rank)` and `.alpha`, which over the rank is the scale of their product. `lora_alpha` is a number, or a dictionary
    by the layers' paths; what it lacks is the rank. A `ValueError` names the key that is none of a U-Net or has no partner.
    """
    layers, kohya = {}, {}
    for key, (name, weight) in zip(state_dict, convert_unet_state_dict_to_peft(state_dict).items()):
        match = re.fullmatch(r"unet\.(.+)\.lora_([AB])\.weight", name)
        if match is None:
            what = "of a text encoder" if key.startswith("text_encoder") else "no LoRA weight of diffusers"
            raise ValueError(f"{key} is {what}: only a U-Net's, unet.*.lora.down.weight and so on, can be converted.")
        layers.setdefault(match[1], {})[match[2]] = weight
    for layer, weights in layers.items():
        if len(weights) == 1:
            raise ValueError(f"unet.{layer} has only one of lora.down.weight and lora.up.weight.")
        alpha = lora_alpha.get(layer) if isinstance(lora_alpha, dict) else lora_alpha
        alpha = torch.tensor(float(len(weights["A"]) if alpha is None else alpha))
        tensors = {"lora_down.weight": weights["A"], "lora_up.weight": weights["B"], "alpha": alpha}
        kohya.update((f"lora_unet_{layer.replace('.', '_')}.{name}", value) for name, value in tensors.items())
    return kohya


def kohya_metadata(kohya, state=None):
    """
    What a file of `kohya_state_dict`'s says of itself: rank, alpha and the kind of base model, and of a run with this
    `training_state.json` the base model, the method, steps and data; folders by their names alone.
    """

    def one_or_dynamic(values):
        return f"{values.pop():g}" if len(values) == 1 else "Dynamic"

    widths = {value.shape[1] for name, value in kohya.items() if name.endswith("attn2_to_k.lora_down.weight")}
    version = BASE_MODEL_VERSIONS.get(max(widths, default=None))
    metadata = {
        # AUTOMATIC1111 takes LoRAs that do not say it for SD 1.x's, and hides those of other models.
        "ss_base_model_version": version,
        "ss_v2": version == "sd_v2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": one_or_dynamic({len(value) for name, value in kohya.items() if "lora_down" in name}),
        "ss_network_alpha": one_or_dynamic({value.item() for name, value in kohya.items() if name.endswith(".alpha")}),
    }
    if state is not None:
        arguments = state["arguments"]
        folders = [arguments.get(name) for name in ("dataset_name", "train_data_dir", "encoded_data_dir")]
        metadata |= {
            "ss_sd_model_name": public_name(arguments["pretrained_model_name_or_path"]),
            "ss_steps": state["global_step"],
            "ncp_loss": f"{arguments['loss_type']} in {arguments['loss_space']} space",
            "ncp_error_scale": state["error_scale"],
            "ncp_beta_dpo": f"{arguments['beta_dpo']:g}",
            "ncp_dataset": public_name(next(filter(None, folders))),
        }
    return {"format": "pt", **{name: str(value) for name, value in metadata.items() if value is not None}}


def public_name(name):
    """A hub id as it is, a folder without where it lies."""
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


# The tool


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lora_weights", type=Path, required=True, help=f"A file, or a folder with {WEIGHTS_NAME}.")
    parser.add_argument("--output_file", type=Path, help="Default: beside it, with _kohya at the end of its name.")
    args = parser.parse_args(input_args)
    file = args.lora_weights / WEIGHTS_NAME if args.lora_weights.is_dir() else args.lora_weights
    if not file.is_file():
        raise ValueError(f"--lora_weights: there is no file {file}.")
    args.lora_weights, args.output_file = file, args.output_file or file.with_name(f"{file.stem}_kohya.safetensors")
    if args.output_file.exists():
        raise ValueError(f"--output_file {args.output_file} is there already: remove it, or give another.")
    return args


def load_lora(path):
    """The tensors of a LoRA's file and what it says of PEFT's configuration; a `ValueError` if it is no safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return safetensors.torch.load_file(path), json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--lora_weights {path} cannot be read as safetensors: {error}") from error


def find_alphas(lora, config):
    """The layers' alphas by their paths, as PEFT's configuration has them; `None` for a file that does not say."""
    if "unet.lora_alpha" not in config:
        return None
    patterns, alphas = config.get("unet.alpha_pattern") or {}, {}
    for name, weight in convert_unet_state_dict_to_peft(lora).items():
        layer = name.removeprefix("unet.").removesuffix(".lora_A.weight")
        alpha = patterns.get(get_pattern_key(patterns, layer), config["unet.lora_alpha"])
        # Rank-stabilized ones are scaled by alpha over the rank's root.
        alphas[layer] = alpha * math.sqrt(len(weight)) if config.get("unet.use_rslora") else alpha
    return alphas


def find_state(path, lora):
    """The `training_state.json` of the checkpoint that holds this very LoRA, in its folder or beside it; or `None`."""
    for folder in (path.parent, *path.parent.glob("checkpoint-*")):
        if (folder / STATE_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            saved = safetensors.torch.load_file(folder / WEIGHTS_NAME)
            if saved.keys() == lora.keys() and all(torch.equal(saved[name], lora[name]) for name in lora):
                return Checkpoints.read_state(folder)
    return None


def main(args):
    lora, config = load_lora(args.lora_weights)
    try:
        kohya = kohya_state_dict(lora, find_alphas(lora, config))
    except ValueError as error:
        raise ValueError(f"--lora_weights {args.lora_weights}: {error}") from error
    state = find_state(args.lora_weights, lora)
    metadata = kohya_metadata(kohya, state)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(kohya, args.output_file, metadata)
    alphas = f"{len(kohya) // 3} layers, rank {metadata['ss_network_dim']}, alpha {metadata['ss_network_alpha']}"
    print(f"{args.output_file}: {alphas}{'' if config else ' (its rank: the file does not say)'}")
    if state is None:
        print("No checkpoint beside it holds this LoRA: the metadata do not say what it was trained on.")


if __name__ == "__main__":
    main(parse_args())
