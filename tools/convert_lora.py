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
import re
import sys
from pathlib import Path

import safetensors.torch
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from diffusers.utils import convert_unet_state_dict_to_peft


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_ncp_dpo_sd15 import STATE_NAME, WEIGHTS_NAME, Checkpoints, describe_run, save_kohya_lora  # noqa: E402


# Where save_lora_weights keeps PEFT's configuration.
ADAPTER_METADATA = "lora_adapter_metadata"


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
    """
    A U-Net's LoRA in PEFT's format, and PEFT's configuration as the file has it; a `ValueError` for what is no safetensors, not of
    a U-Net, or only half there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(ADAPTER_METADATA, "{}"))
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--lora_weights {path} cannot be read as safetensors: {error}") from error
    lora = convert_unet_state_dict_to_peft(tensors)
    for key, name in zip(tensors, lora):
        match = re.fullmatch(r"(unet\..+)\.lora_([AB])\.weight", name)
        if match is None:
            what = "of a text encoder" if key.startswith("text_encoder") else "no LoRA weight of diffusers"
            only = "only a U-Net's, unet.*.lora.down.weight and so on, can be converted"
            raise ValueError(f"--lora_weights {path}: {key} is {what}: {only}.")
        if f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight" not in lora:
            raise ValueError(f"--lora_weights {path}: {match[1]} has only one of lora.down.weight and lora.up.weight.")
    return lora, config


def find_alphas(lora, config):
    """The layers' alphas by their paths, as PEFT's configuration has them; none if it does not say, when they are the ranks."""
    if "unet.lora_alpha" not in config:
        return {}
    patterns, alphas = config.get("unet.alpha_pattern") or {}, {}
    for name, weight in lora.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("unet.").removesuffix(".lora_A.weight")
            alpha = patterns.get(get_pattern_key(patterns, layer), config["unet.lora_alpha"])
            # Rank-stabilized ones are scaled by alpha over the rank's root.
            alphas[layer] = alpha * math.sqrt(len(weight)) if config.get("unet.use_rslora") else alpha
    return alphas


def find_state(path, lora):
    """The `training_state.json` of the checkpoint that holds this very LoRA, in its folder or beside it; or `None`."""
    for folder in (path.parent, *path.parent.glob("checkpoint-*")):
        if (folder / STATE_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            saved = convert_unet_state_dict_to_peft(safetensors.torch.load_file(folder / WEIGHTS_NAME))
            if saved.keys() == lora.keys() and all(torch.equal(saved[name], lora[name]) for name in lora):
                return Checkpoints.read_state(folder)
    return None


def main(args):
    lora, config = load_lora(args.lora_weights)
    state = find_state(args.lora_weights, lora)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    description = {} if state is None else describe_run(state)
    metadata = save_kohya_lora(args.output_file, lora, find_alphas(lora, config), description)
    said = f"{len(lora) // 2} layers, rank {metadata['ss_network_dim']}, alpha {metadata['ss_network_alpha']}"
    print(f"{args.output_file}: {said}{'' if config else ' (its rank: the file does not say)'}")
    if state is None:
        print("No checkpoint beside it holds this LoRA: the metadata do not say what it was trained on.")


if __name__ == "__main__":
    main(parse_args())
