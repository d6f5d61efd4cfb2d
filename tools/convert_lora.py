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

"""Converts a U-Net's LoRA from diffusers' format to that of kohya's scripts, for ComfyUI, AUTOMATIC1111 and Forge.

    python tools/convert_lora.py --lora_weights ncp-dpo-sd15

writes ncp-dpo-sd15/pytorch_lora_weights_kohya.safetensors. Each layer keeps its rank and alpha. The metadata say how the LoRA
was trained if the checkpoint that holds the same LoRA is beside it. SDXL's layers have diffusers' names, which these three
programs understand too. sd-scripts itself has other names for them.
"""

import json
import re
from pathlib import Path

from common import ArgumentParser, run, whole_file


# torch, peft and diffusers are imported late: they take seconds to load.
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# Key of PEFT's configuration in the metadata that `save_lora_weights` writes.
ADAPTER_METADATA = "lora_adapter_metadata"


def parse_args(input_args=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--lora_weights", type=Path, required=True, help=f"A file, or a folder with {WEIGHTS_NAME}.")
    parser.add_argument(
        "--output_file", type=Path, help="The new file. Default: the input's name with _kohya at its end."
    )
    args = parser.parse_args(input_args)
    file = args.lora_weights / WEIGHTS_NAME if args.lora_weights.is_dir() else args.lora_weights
    if not file.is_file():
        raise ValueError(f"--lora_weights: there is no file {file}.")
    args.lora_weights, args.output_file = file, args.output_file or file.with_name(f"{file.stem}_kohya.safetensors")
    if args.output_file.exists():
        raise ValueError(f"--output_file {args.output_file} exists already: remove it, or give another name.")
    return args


def load_lora(path):
    """
    A U-Net's LoRA in PEFT's format, the alphas that the file has as tensors, by layer, and PEFT's configuration, if the file
    has it. A `ValueError` for a file that is not safetensors or holds anything but whole layers of a U-Net's plain LoRA.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(ADAPTER_METADATA, "{}"))
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--lora_weights {path} cannot be read as safetensors: {error}") from error
    alphas = {
        name.removeprefix("unet.").removesuffix(".alpha"): tensors.pop(name).item()
        for name in list(tensors)
        if name.startswith("unet.") and name.endswith(".alpha")
    }
    lora = convert_unet_state_dict_to_peft(tensors)
    for key, name in zip(tensors, lora):
        match = re.fullmatch(r"(unet\..+)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(
                f"--lora_weights {path} holds {key}. Only a U-Net's plain LoRA can be converted, whose keys are "
                "unet.*.lora.down.weight, unet.*.lora.up.weight and so on."
            )
        if f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight" not in lora:
            raise ValueError(f"--lora_weights {path}: {match[1]} has only one of lora.down.weight and lora.up.weight.")
    if others := sorted(layer for layer in alphas if f"unet.{layer}.lora_A.weight" not in lora):
        raise ValueError(f"--lora_weights {path}: unet.{others[0]} has an alpha, but no weights.")
    return lora, alphas, config


def find_state(path, lora):
    """The `training_state.json` of the checkpoint that holds the same LoRA, in the file's folder or below, or `None`."""
    import torch
    from safetensors.torch import load_file
    from train_ncp_dpo_sd15 import STATE_NAME

    from diffusers.utils import convert_unet_state_dict_to_peft

    for folder in (path.parent, *path.parent.glob("checkpoint-*")):
        if (folder / STATE_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            saved = convert_unet_state_dict_to_peft(load_file(folder / WEIGHTS_NAME))
            if saved.keys() == lora.keys() and all(torch.equal(saved[name], lora[name]) for name in lora):
                return json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    return None


def main(args):
    from train_ncp_dpo_sd15 import describe_run, find_alphas, save_kohya_lora

    lora, file_alphas, config = load_lora(args.lora_weights)
    suffix = ".lora_A.weight"
    ranks = {
        name.removeprefix("unet.").removesuffix(suffix): len(lora[name]) for name in lora if name.endswith(suffix)
    }
    alphas, state = find_alphas(ranks, file_alphas, config), find_state(args.lora_weights, lora)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    description = {} if state is None else describe_run(state)
    with whole_file(args.output_file) as incomplete:
        metadata = save_kohya_lora(incomplete, lora, alphas, description)
    network = f"rank {metadata['ss_network_dim']}, alpha {metadata['ss_network_alpha']}"
    print(f"{args.output_file}: {len(lora) // 2} layers, {network}")
    if not file_alphas and "unet.lora_alpha" not in config:
        print("The file has no alphas. Each layer's alpha is its rank, as in diffusers.")
    if state is None:
        print("No checkpoint beside it holds this LoRA, so the metadata do not say how it was trained.")


if __name__ == "__main__":
    run(main, parse_args)
