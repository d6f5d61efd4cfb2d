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

"""Small Stable Diffusion U-Nets with the real classes and block layout, and with random weights."""

import torch
from peft import LoraConfig

from diffusers import UNet2DConditionModel


TEXT_DIM = 16
POOLED_DIM = 8
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2"]


def sd15_unet(seed=0, **overrides):
    """Blocks as in Stable Diffusion 1.5, one fewer: with cross-attention, and then one without."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_DIM,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    }
    return UNet2DConditionModel(**{**config, **overrides})


def sdxl_unet(seed=0, **overrides):
    """Blocks as in SDXL: no attention at the full size, deeper transformers in the lower blocks, micro-conditioning."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": TEXT_DIM,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED_DIM,
    }
    return UNet2DConditionModel(**{**config, **overrides})


UNETS = {"sd15": sd15_unet, "sdxl": sdxl_unet}


def conditioning(unet, batch_size, seed=0):
    """`(encoder_hidden_states, added_cond_kwargs)` for `unet`, in its dtype and on its device. SD1.5 has `None` second."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    encoder_hidden_states = torch.randn(batch_size, 7, config.cross_attention_dim, generator=generator).to(
        unet.device, unet.dtype
    )
    if config.addition_embed_type != "text_time":
        return encoder_hidden_states, None
    pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return encoder_hidden_states, {
        "text_embeds": torch.randn(batch_size, pooled_dim, generator=generator).to(unet.device, unet.dtype),
        # (original height, width, crop top, left, target height, width), different for each image.
        "time_ids": torch.randint(0, 1024, (batch_size, 6), generator=generator).to(unet.device, unet.dtype),
    }


def add_lora(unet, rank=2, std=0.2, seed=0, adapter_name="default", target_modules=LORA_TARGETS):
    """Adds an adapter as the scripts do, but with random up-weights, so that it changes the output."""
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=target_modules)
    unet.add_adapter(config, adapter_name)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora_" in name and f".{adapter_name}." in name:
            with torch.no_grad():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return unet


def lora_parameters(unet):
    return {name: parameter for name, parameter in unet.named_parameters() if "lora_" in name}
