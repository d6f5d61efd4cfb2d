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

"""What an optimization step costs: in operations and memory, counted, and in time, measured.

    python benchmarks/step_cost.py count                    # any machine: FLOPs, memory, bytes and kernels of SDXL and SD1.5
    python benchmarks/step_cost.py time --json result.json  # a GPU: pairs per second, peak memory and MFU of both
    python benchmarks/step_cost.py time --model small       # any machine: the same steps with a small model

Every step is what the training scripts do with a batch, on their own policy, with random weights and latents. They are compared
with diffusers' way, "latent DPO, VAE in the loop", and with "the authors' way", which measures the literal eq. 13 with a second
U-Net, kept for its encoder: three passes of one prediction each and no gradient checkpointing in them, after VAE and text
encoders have encoded the batch. Its encoder stops at the mid block, as ours does. The VAE is in the precision that it has in
diffusers' scripts: float32 for SDXL, that of the U-Net for SD1.5.

`count` makes steps of fake tensors, which need no weights, and writes `benchmarks/results/step_cost_count.jsonl` and all tables of
README.md and docs/ that come from it or from `gpu_time.json`. It takes some minutes.

MFU is the share of the device's peak that goes into the FLOPs that `count` finds in the step without gradient checkpointing. The
peak is the data sheet's where it is known here, and else that of a large matrix product, measured.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
import weakref
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import step_cost_tables
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging


sys.path.insert(0, str(step_cost_tables.ROOT))

from ncp_loss import LOSSES, LatentSpace, NoiseConditionedPerception, preference_loss, reference_model  # noqa: E402


class Model(NamedTuple):
    """Where the training step is, and the configurations of the models, as in the released checkpoints."""

    script: str
    resolution: int
    rank: int
    unet: dict
    vae: dict
    text_encoders: dict
    vae_dtype: torch.dtype | None = torch.float32  # in diffusers' scripts; `None` for the U-Net's
    # Pairs per step that are timed: as in the README's commands, and what keeps a large GPU busy.
    batch_sizes: tuple = (1,)


def vae_config(channels):
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 2,
        "latent_channels": 4,
    }


def text_config(hidden_size, num_hidden_layers, num_attention_heads, **options):
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        **options,
    }


def sdxl_unet_config(channels, **options):
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        **options,
    }


CLIP_L = text_config(768, 12, 12)
MODELS = {
    "sdxl": Model(
        script="train_ncp_dpo_sdxl",
        resolution=1024,
        rank=64,
        unet=sdxl_unet_config(
            (320, 640, 1280),
            sample_size=128,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        vae=vae_config((128, 256, 512, 512)),
        text_encoders={
            "": (CLIPTextModel, CLIP_L),
            "_2": (CLIPTextModelWithProjection, text_config(1280, 32, 20, projection_dim=1280, hidden_act="gelu")),
        },
        batch_sizes=(1, 8),
    ),
    "sd15": Model(
        script="train_ncp_dpo_sd15",
        resolution=512,
        rank=64,
        unet={"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        vae=vae_config((128, 256, 512, 512)),
        text_encoders={"": (CLIPTextModel, CLIP_L)},
        vae_dtype=None,
        batch_sizes=(8, 32),
    ),
    # SDXL's blocks with a tenth of its channels. Of the U-Net's FLOPs the encoder has 40 %, and encoding the batch costs
    # 70 %; of SDXL's they are 43 % and 73 %.
    "small": Model(
        script="train_ncp_dpo_sdxl",
        resolution=192,
        rank=8,
        unet=sdxl_unet_config(
            (32, 64, 128),
            sample_size=24,
            transformer_layers_per_block=(1, 1, 4),
            attention_head_dim=(2, 4, 8),
            cross_attention_dim=64,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + 32,
            norm_num_groups=8,
        ),
        vae={**vae_config((8, 16, 32, 64)), "norm_num_groups": 8},
        text_encoders={
            "": (CLIPTextModel, text_config(32, 4, 2)),
            "_2": (CLIPTextModelWithProjection, text_config(32, 8, 2, projection_dim=32)),
        },
    ),
}


class Variant(NamedTuple):
    """A way to make a step. In half precision differences are central, unless `probe_rms` is 0: the literal formula."""

    loss_space: str = "ncp"
    loss_type: str = "dpo"
    dtype: torch.dtype = torch.bfloat16
    probe_rms: float | None = None
    target_timestep: str = "previous"
    encoded: bool = True  # the data are latents and text embeddings
    second_unet: bool = False  # the authors' way
    use_8bit_adam: bool = True  # where there is one
    flags: tuple = ()  # more of the training script
    lora_layer: str = "fused"  # the scripts', or PEFT's: "cast" with its cast of the input, or "no cast"
    both_sides: bool = False  # the gradient is taken at both sides of a central difference
    measures_scale: bool = False  # no step, but a measurement of both errors for the error scale
    up_blocks_checkpointed: bool = True


VARIANTS = {
    "latent DPO": Variant(loss_space="latent"),
    "latent DPO, VAE in the loop": Variant(loss_space="latent", encoded=False),
    "NCP-DPO": Variant(),
    "NCP-DPO, one-sided": Variant(probe_rms=0),
    "NCP-DPO, one-sided, current timestep": Variant(probe_rms=0, target_timestep="current"),
    "NCP-CPO": Variant(loss_type="cpo"),
    "NCP-SFT": Variant(loss_type="sft"),
    "NCP-DPO, the authors' way": Variant(probe_rms=0, encoded=False, second_unet=True),
    "NCP-DPO, PEFT's layers and both sides": Variant(lora_layer="cast", both_sides=True),
    "measuring the error scale": Variant(measures_scale=True),
}
# The policy alone, counted with the kernels of a CPU.
LAYERS = {
    name: Variant(loss_space="latent", loss_type="cpo", lora_layer=lora_layer)
    for name, lora_layer in {
        "PEFT's layers": "cast",
        "PEFT's layers, without the cast": "no cast",
        "the scripts' layers": "fused",
    }.items()
}
# What decides on flags, and what the last changes save: timed first, with SDXL and 8 pairs. Neighbours share a policy.
CHOICES = {
    "latent DPO": VARIANTS["latent DPO"],
    "NCP-DPO": VARIANTS["NCP-DPO"],
    "NCP-DPO, both sides": Variant(both_sides=True),
    "latent DPO, PEFT's layers": Variant(loss_space="latent", lora_layer="cast"),
    "NCP-DPO, PEFT's layers and both sides": VARIANTS["NCP-DPO, PEFT's layers and both sides"],
    **{
        f"{name}, {title}": VARIANTS[name]._replace(**options)
        for title, options in {
            "--channels_last": {"flags": ("--channels_last",)},
            "up blocks not checkpointed": {"up_blocks_checkpointed": False},
            "--compile": {"flags": ("--compile",)},
            "--channels_last --compile": {"flags": ("--channels_last", "--compile")},
        }.items()
        for name in ("latent DPO", "NCP-DPO")
    },
}
TIMED_VARIANTS = {
    **CHOICES,
    **{name: variant for name, variant in VARIANTS.items() if not variant.measures_scale},
    "NCP-DPO, AdamW in 32 bits": Variant(use_8bit_adam=False),
}
WARM_UP_STEPS = 2
COUNTED_BATCH_SIZES = (1, 8)  # pairs


class Tokenizer:
    """In place of a tokenizer, whose time does not count."""

    def __call__(self, captions, **options):
        return SimpleNamespace(input_ids=torch.zeros(len(captions), 77, dtype=torch.long))


class BothSides(NoiseConditionedPerception):
    """Takes the gradient of central differences at both sides, as was done before."""

    def _error_and_gradient(self, model_pred, anchor, needs_gradient):
        delta = anchor.k * (model_pred.detach().float() - anchor.center_pred)
        probe, inverse_size = self._probe(delta, self._probe_rms)
        points = torch.cat([anchor.center + probe, anchor.center - probe])
        with self._frozen_encoder(), torch.enable_grad():
            features = self._features(points.requires_grad_(), *anchor.conditioning)
            ahead, behind = features.detach().float().chunk(2)
            change = (ahead - behind) * inverse_size
            slope = anchor.ref_change + change
            torch.autograd.backward(features, slope.repeat(2, 1, 1, 1).to(features.dtype), inputs=points)
        errors = anchor.ref_errors + (change * (anchor.ref_change + slope)).mean(dim=(1, 2, 3))
        return errors, 2 / slope[0].numel() * anchor.k * sum(points.grad.chunk(2)) / 2


class Step:
    """
    A variant's training step, ready to run.

    Args:
        model (`Model`): random weights of these configurations are created on `device`.
        variant (`Variant`): the way.
        device (`str`): "meta" for none.
        batch_size (`int`): pairs per step.
        gradient_checkpointing (`bool`): in the policy, and so in the encoder where this is the same U-Net.
        policy (`UNet2DConditionModel`, *optional*): that of another step, if no flag of the variant asks for its own.
    """

    def __init__(self, model, variant, device, batch_size=1, gradient_checkpointing=False, policy=None):
        self.model, self.variant, self.device, self.batch_size = model, variant, device, batch_size
        self.script = importlib.import_module(model.script)
        flags = ["--pretrained_model_name_or_path", "random", "--mixed_precision", "no", "--max_train_steps", "1"]
        flags += ["--rank", str(model.rank), "--loss_type", variant.loss_type, "--loss_space", variant.loss_space]
        flags += ["--gradient_checkpointing"] * gradient_checkpointing
        flags += ["--use_8bit_adam"] * (variant.use_8bit_adam and has_8bit_adam(device))
        flags += ["--encoded_data_dir" if variant.encoded else "--dataset_name", "random", *variant.flags]
        self.args = self.script.parse_args(flags)

        self.policy = policy or self.create_policy()
        self.policy.train()
        self.second_unet = None
        if variant.second_unet:
            self.second_unet = self.create_unet(variant.dtype).requires_grad_(False)
        self.perception = self.create_perception()
        self.pipeline = SimpleNamespace(**({} if variant.encoded else self.create_components()))
        self.scheduler = self.create_scheduler()
        self.batch = self.create_batch()

    def create_unet(self, dtype):
        with torch.device(self.device):
            return UNet2DConditionModel(**self.model.unet).to(dtype)

    def create_policy(self):
        policy = self.script.create_policy(self.args, self.create_unet(self.variant.dtype), None)
        for layer in policy.modules():
            if isinstance(layer, self.script.FusedLoraLinear) and self.variant.lora_layer != "fused":
                layer.__class__ = LoraLinear
                layer.cast_input_dtype_enabled = self.variant.lora_layer == "cast"
        if not self.variant.up_blocks_checkpointed:
            for block in policy.up_blocks:
                block.gradient_checkpointing = False
        return policy

    def create_scheduler(self):
        return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

    def create_perception(self):
        if self.variant.loss_space == "latent":
            return LatentSpace
        options = {"target_timestep": self.variant.target_timestep, "probe_rms": self.variant.probe_rms}
        perception = BothSides if self.variant.both_sides else NoiseConditionedPerception
        return perception(self.second_unet or self.policy, self.create_scheduler(), **options)

    def create_components(self):
        """VAE and text encoders, these in the precision of the U-Net, as peers have them."""
        components = {"config": SimpleNamespace(force_zeros_for_empty_prompt=False)}
        with torch.device(self.device):
            vae = AutoencoderKL(**self.model.vae).requires_grad_(False)
            components["vae"] = vae.to(self.model.vae_dtype or self.variant.dtype)
            for suffix, (text_encoder_class, config) in self.model.text_encoders.items():
                text_encoder = text_encoder_class(CLIPTextConfig(**config)).requires_grad_(False)
                components["text_encoder" + suffix] = text_encoder.to(self.variant.dtype)
                components["tokenizer" + suffix] = Tokenizer()
        return components

    def create_batch(self):
        """Random pairs as the data loader gives them, images or, encoded, latents and text embeddings."""
        config, num_pairs = self.policy.config, self.batch_size
        num_images = num_pairs if self.variant.loss_type == "sft" else 2 * num_pairs
        latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        with torch.device(self.device):
            batch = {
                "timesteps": torch.randint(1000, (num_pairs,)),
                "noise": torch.randn(num_pairs, *latent_shape),
                "variance_noise": torch.randn(num_pairs, *latent_shape),
                "time_ids": torch.ones(num_images, 6),
            }
            if not self.variant.encoded:
                resolution = self.model.resolution
                return {
                    **batch,
                    "pixel_values": torch.rand(num_images, 3, resolution, resolution),
                    "caption": [""] * num_pairs,
                }
            prompt = {"prompt_embeds": torch.randn(num_pairs, 77, config.cross_attention_dim)}
            if config.addition_embed_type is not None:
                pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                prompt["pooled_prompt_embeds"] = torch.randn(num_pairs, pooled_dim)
            prompt = {name: value.to(self.variant.dtype) for name, value in prompt.items()}
            return {**batch, "latents": torch.randn(num_images, *latent_shape), "prompt": prompt}

    def create_optimizer(self):
        return self.script.create_optimizer(self.args, self.policy, self.args.train_batch_size)[0]

    def denoising(self):
        return self.script.noise_batch(self.args, self.batch, self.pipeline, self.scheduler)

    def loss(self, denoising):
        if self.variant.measures_scale:
            with torch.no_grad():
                predictions = self.script.predict(denoising, self.policy, self.policy, needs_reference=True)
                for space in (LatentSpace, self.perception):
                    space.errors(denoising, *predictions)
            return None
        if self.second_unet is None:
            needs_reference = LOSSES[self.args.loss_type].needs_reference
            model_pred, ref_pred = self.script.predict(denoising, self.policy, self.policy, needs_reference)
            errors = self.perception.errors(denoising, model_pred, ref_pred)
            return self.script.measure_loss(self.args, errors, self.batch)
        # The authors' way: features of the target, of the reference's prediction and of the policy's, one by one.
        with torch.no_grad(), reference_model(self.policy):
            ref_pred = denoising.predict(self.policy)
        anchor = self.perception.anchor(denoising)
        ref_errors = self.perception.error(ref_pred, anchor)
        errors = self.perception.error(denoising.predict(self.policy), anchor)
        return preference_loss(errors, ref_errors).loss

    def num_parameters(self):
        """Of the LoRA, of the U-Nets without it, and of VAE and text encoders."""
        lora = sum(parameter.numel() for parameter in self.policy.parameters() if parameter.requires_grad)
        unets = sum(parameter.numel() for parameter in self.policy.parameters()) - lora
        if self.second_unet is not None:
            unets *= 2
        return {"LoRA": lora, "U-Nets": unets, "VAE": self._size_of("vae"), "text": self._size_of("text_encoder")}

    def _size_of(self, prefix):
        components = [component for name, component in vars(self.pipeline).items() if name.startswith(prefix)]
        return sum(parameter.numel() for component in components for parameter in component.parameters())


# Counting


# Of an H100: FLOP/s in bf16, bytes per second of its memory, and seconds in which Python launches a kernel.
H100_FLOPS, H100_BANDWIDTH, LAUNCH_SECONDS = 989e12, 3.35e12, 5e-6
NUM_LARGEST = 3
# Fake tensors have shapes and no data, like those of the meta device. Unlike them, they know autocast.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def tensors_of(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_of(value)


class Part:
    """
    What a part of a step costs.

    Attributes:
        flops (`int`): floating-point operations, by the formulas of `torch.utils.flop_counter`.
        recomputed_flops (`int`): those of them that gradient checkpointing adds.
        num_bytes (`int`): bytes that the kernels read and write.
        num_kernels (`int`): operations other than views and allocations.
        device_seconds (`float`): the least time on an H100. Each kernel takes as long as its operations at its peak, or
            as its bytes at its bandwidth, whichever is longer.
        peak (`int`): most bytes alive at a time.
        items (`dict`): bytes and number of kernels by what they do and in which module.
    """

    def __init__(self):
        self.flops = self.recomputed_flops = self.num_bytes = self.num_kernels = self.peak = 0
        self.device_seconds = 0.0
        self.items = {}

    def add_kernel(self, item, flops, num_bytes):
        self.flops += flops
        self.num_bytes += num_bytes
        self.num_kernels += 1
        self.device_seconds += max(flops / H100_FLOPS, num_bytes / H100_BANDWIDTH)
        item_bytes, item_kernels = self.items.get(item, (0, 0))
        self.items[item] = item_bytes + num_bytes, item_kernels + 1

    def to_dict(self):
        largest = sorted(self.items.items(), key=lambda item: -item[1][0])[:NUM_LARGEST]
        return {
            "flops": self.flops,
            "recomputed_flops": self.recomputed_flops,
            "bytes": self.num_bytes,
            "kernels": self.num_kernels,
            "floor_seconds": round(max(self.device_seconds, self.num_kernels * LAUNCH_SECONDS), 6),
            "peak_bytes": self.peak,
            "largest": [[name, *numbers] for name, numbers in largest],
        }


class Meter(TorchDispatchMode):
    """
    Counts kernels, their operations and bytes, and the bytes of the tensors created meanwhile that are still alive.

    Attributes:
        parts (`dict`): a [`Part`] by name; "rest" is what belongs to no other.
    """

    def __init__(self):
        super().__init__()
        self.parts = defaultdict(Part)
        self.live = 0
        self.storages = set()
        self.current_part = "rest"
        self.modules = []

    @contextlib.contextmanager
    def part(self, name):
        outer, self.current_part = self.current_part, name
        self.parts[name].peak = max(self.parts[name].peak, self.live)
        yield
        self.current_part = outer

    @contextlib.contextmanager
    def modules_followed(self):
        """Knows in this context in which module a kernel runs."""

        def enter(module, args):
            self.modules.append(module)

        def leave(module, args, output):
            self.modules.pop()

        # Checkpointing leaves a block by an exception as soon as it has computed again what it needs.
        with register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True):
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = (list(tensors_of(values)) for values in ([*args, *kwargs.values()], [result]))
        # Views and results written in place have an argument's storage, which may be older than the meter.
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        created = [tensor.untyped_storage() for tensor in outputs]
        created = [storage for storage in created if storage._cdata not in known]
        for storage in created:
            self.watch(storage)
        name = func._schema.name.removeprefix("aten::")
        if (created or func._schema.is_mutable) and not name.startswith(("empty", "new_empty")):
            count_flops = flop_registry.get(func._overloadpacket)
            flops = count_flops(*args, **kwargs, out_val=result) if count_flops else 0
            part = self.parts[self.current_part]
            part.add_kernel(self.describe(name, outputs), flops, sum(t.nbytes for t in inputs + outputs))
            # A module that runs within a backward pass computes again what checkpointing did not keep.
            if self.modules and torch._C._current_graph_task_id() != -1:
                part.recomputed_flops += flops
        return result

    def describe(self, name, outputs):
        """The operation, the dtype of its result and the class of the module that runs it; gradients have none."""
        dtype = str(outputs[0].dtype).removeprefix("torch.") if outputs else "in place"
        if not self.modules:
            return f"{name.strip('_')} {dtype}"
        module = type(self.modules[-1])
        return f"{name.strip('_')} {dtype} in {module.__module__.partition('.')[0]} {module.__name__}"

    def watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.live += size
            part = self.parts[self.current_part]
            part.peak = max(part.peak, self.live)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.storages.remove(key)
        self.live -= size


def in_float32(norm):
    """A normalization as CUDA's autocast runs it, in float32; that of the CPU leaves it in bf16."""

    def norm_in_float32(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return norm(*args, **kwargs)

    return norm_in_float32


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """Attention as on a GPU, by an operation whose FLOPs are known."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]


@contextlib.contextmanager
def metered(step, meter, device="cuda"):
    """Lets the meter see the parts of a step, with the U-Net in autocast as accelerate wraps it, with the kernels of `device`."""
    lora = next(module for module in step.policy.modules() if isinstance(module, BaseTunerLayer))
    forward = torch.autocast("cpu", step.variant.dtype, enabled=step.variant.dtype != torch.float32)(
        step.policy.forward
    )

    def metered_forward(*args, **kwargs):
        with meter.part("reference" if lora.disable_adapters else "policy"):
            return forward(*args, **kwargs)

    patches = [mock.patch.object(step.policy, "forward", metered_forward)]
    if device == "cuda":
        patches += [
            mock.patch.object(F, "scaled_dot_product_attention", flash_attention),
            mock.patch.object(F, "group_norm", in_float32(F.group_norm)),
            mock.patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        ]
    for owner, name, part in [
        (step.script, "encode_images", "VAE"),
        (step.script, "encode_prompt", "text"),
        (step.perception, "anchor", "anchor"),
        (step.perception, "error", "error"),
    ]:
        if hasattr(owner, name):  # latent space has neither anchor nor error
            patches.append(mock.patch.object(owner, name, meter.part(part)(getattr(owner, name))))
    with contextlib.ExitStack() as stack:
        for context in [*patches, meter.modules_followed(), meter]:
            stack.enter_context(context)
        yield


def create_fake_policy(model, variant, gradient_checkpointing):
    """The policy of a [`Step`], of fake tensors."""
    variant = Variant(loss_space="latent", dtype=variant.dtype, lora_layer=variant.lora_layer)
    policy = Step(model, variant, "meta", gradient_checkpointing=gradient_checkpointing).policy
    with FAKE:
        return policy.to_empty(device="cpu")


def create_fake_step(model, variant, batch_size=1, gradient_checkpointing=False, policy=None):
    """A [`Step`] of fake tensors; `policy` is of `create_fake_policy`."""
    policy = policy or create_fake_policy(model, variant, gradient_checkpointing)
    step = Step(model, variant, "meta", batch_size, gradient_checkpointing, policy)
    with FAKE:
        for module in [step.second_unet, *vars(step.pipeline).values()]:
            if isinstance(module, torch.nn.Module):
                module.to_empty(device="cpu")
        step.batch = tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), step.batch)
    step.perception = step.create_perception()  # Its table is where the U-Net is.
    return step


def count(model, variant, batch_size=1, gradient_checkpointing=False, policy=None, device="cuda"):
    """
    Makes a step of fake tensors and counts what it costs, with the kernels that `device` has. A CPU's autocast leaves
    normalizations in bf16, and the FLOPs of its attention are not known.

    Returns:
        A dictionary of "num_images", "num_parameters" by model, "vae_itemsize" (bytes of a parameter) and "parts", which
        has [`Part.to_dict`] of "VAE", "text" (encoders), "reference", "anchor" (the encoder without gradient), "policy",
        "error" (the encoder, forward and backward), "backward" (the policy's, with what is computed again) and "rest".
    """
    step, meter = create_fake_step(model, variant, batch_size, gradient_checkpointing, policy), Meter()
    step.policy.zero_grad()
    with FAKE, metered(step, meter, device):
        denoising = step.denoising()
        loss = step.loss(denoising)
        if loss is not None:
            with meter.part("backward"):
                loss.backward()
    return {
        "num_images": len(denoising.timesteps),
        "num_parameters": step.num_parameters(),
        "vae_itemsize": (model.vae_dtype or variant.dtype).itemsize,
        "parts": {name: part.to_dict() for name, part in meter.parts.items()},
    }


@functools.cache
def cached_fake_policy(model, lora_layer):
    return create_fake_policy(MODELS[model], Variant(lora_layer=lora_layer), gradient_checkpointing=True)


def count_variant(model, batch_size, name, device):
    """One step with gradient checkpointing, by names, as a line of the results."""
    variant = (VARIANTS if device == "cuda" else LAYERS)[name]
    policy = cached_fake_policy(model, variant.lora_layer)
    step = count(MODELS[model], variant, batch_size, gradient_checkpointing=True, policy=policy, device=device)
    return {"model": model, "batch_size": batch_size, "name": name, "device": device, **step}


def is_counted(model, variant):
    """Whether a variant is counted: not if it costs what "NCP-DPO, one-sided" costs, and PEFT's layers for SDXL only."""
    return variant.target_timestep == "previous" and (variant.lora_layer == "fused" or model == "sdxl")


def main_count(args):
    settings = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")},
        "rank": MODELS["sdxl"].rank,
        "flops_per_second": H100_FLOPS,
        "bytes_per_second": H100_BANDWIDTH,
        "launch_seconds": LAUNCH_SECONDS,
    }
    jobs = [
        (model, batch_size, name, "cuda")
        for model in step_cost_tables.TITLES
        for batch_size in COUNTED_BATCH_SIZES
        for name, variant in VARIANTS.items()
        if is_counted(model, variant)
    ]
    jobs += [("sdxl", 8, name, "cpu") for name in LAYERS]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=context, initializer=logging.set_verbosity_error
    ) as executor:
        steps = list(tqdm(executor.map(count_variant, *zip(*jobs)), "Steps", len(jobs)))
    lines = [json.dumps(line, ensure_ascii=False) for line in [settings, *steps]]
    step_cost_tables.COUNTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    step_cost_tables.write_tables()


# Timing


def optimize(step, optimizer):
    """One optimization step; returns its seconds."""
    start = time.perf_counter()
    step.loss(step.denoising()).backward()
    torch.nn.utils.clip_grad_norm_(step.policy.parameters(), step.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if step.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_together(variants, model, batch_size, device, args, policy=None):
    """
    Makes steps of several variants in turns, so that whatever else the machine does falls on all alike; `policy` is for
    [`Step`].

    Returns:
        A dictionary per variant: "seconds_per_step" (the median after warm-up), "seconds_range" (the fastest and the slowest),
        "pairs_per_second", and on a GPU "peak_memory_gb" (of all the variants that share its memory: give it one at a time).
    """
    steps = {}
    for name, variant in variants.items():
        step = Step(model, variant, device, batch_size, args.gradient_checkpointing, policy)
        if variant.dtype != torch.float32:
            # As accelerate does.
            forward = functools.partial(type(step.policy).forward, step.policy)
            step.policy.forward = torch.autocast(device, variant.dtype)(forward)
        steps[name] = (step, step.create_optimizer())
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = {name: [] for name in variants}
    for _ in range(WARM_UP_STEPS + args.steps):
        for name, (step, optimizer) in steps.items():
            seconds[name].append(optimize(step, optimizer))
    results = {}
    for name in variants:
        measured = seconds[name][WARM_UP_STEPS:]
        median = statistics.median(measured)
        results[name] = {
            "seconds_per_step": median,
            "seconds_range": [min(measured), max(measured)],
            "pairs_per_second": batch_size / median,
        }
        if device == "cuda":
            results[name]["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return results


def has_8bit_adam(device):
    return device == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def time_models(device, args):
    """
    Times `TIMED_VARIANTS` of the models of `args`: on a GPU one after the other, on a CPU in float32 and in turns.

    Yields:
        The model's name, the pairs per step, and `time_together`'s results of them, or a dictionary with the reason as
        "skipped".
    """
    if device != "cuda":
        variants = {}
        for name, variant in TIMED_VARIANTS.items():
            # Where every difference is one-sided, LoRA layers are PEFT's, and AdamW has 32 bits.
            variant = variant._replace(dtype=torch.float32, probe_rms=None, use_8bit_adam=False)
            variant = variant._replace(lora_layer="fused", both_sides=False)
            if not args.gradient_checkpointing:
                variant = variant._replace(up_blocks_checkpointed=True)
            if variant not in variants.values():
                variants[name] = variant
        for model in args.model:
            for batch_size in MODELS[model].batch_sizes:
                yield model, batch_size, time_together(variants, MODELS[model], batch_size, device, args)
        return
    # What takes longest to begin comes last.
    others = [name for name in TIMED_VARIANTS if name not in CHOICES]
    jobs = [("sdxl", [8], name) for name in CHOICES] if "sdxl" in args.model else []
    names = ["latent DPO", "NCP-DPO", *others, "NCP-DPO, --compile"]
    jobs += [(model, MODELS[model].batch_sizes, name) for model in args.model for name in names]
    previous = policy = None
    for model, batch_sizes, name in jobs:
        variant = TIMED_VARIANTS[name]
        if "--compile" in variant.flags and importlib.util.find_spec("triton") is None:
            yield model, batch_sizes[0], {name: {"skipped": "triton is not installed"}}
            continue
        made_of = model, variant.flags, variant.lora_layer, variant.up_blocks_checkpointed
        if made_of != previous:
            previous, policy = made_of, None
            torch._dynamo.reset()
            free_memory()
            policy = Step(MODELS[model], variant, device, 1, args.gradient_checkpointing).policy
        for batch_size in batch_sizes:
            try:
                results = time_together({name: variant}, MODELS[model], batch_size, device, args, policy)
            except torch.cuda.OutOfMemoryError:
                results = {name: {"skipped": "out of memory"}}
            yield model, batch_size, results
            free_memory()


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()


# Of dense bf16 matrix products, by what is in the device's name; the first that fits.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


def peak_flops(device):
    """The device's FLOP/s: of the data sheet, or of a matrix product; and which of the two."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for part, tflops in PEAK_TFLOPS.items():
        if part in name:
            return 1e12 * tflops, "data sheet"
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds), "a matrix product"


def flops_per_pair(model, variant):
    """Of a step of a `Model` without gradient checkpointing."""
    return step_cost_tables.step_flops(count(model, variant))[0]


def add_mfu(models, peak):
    """Enters "mfu" into the results of all models that were timed."""
    counted = []
    for part in models.values():
        for name, result in part["results"].items():
            if "skipped" not in result:
                # Without what changes no FLOPs.
                variant = TIMED_VARIANTS[name]._replace(flags=(), use_8bit_adam=True, lora_layer="fused")
                variant = variant._replace(up_blocks_checkpointed=True)
                counted.append((result, part["model"], variant))
    distinct = list(dict.fromkeys((name, variant) for _, name, variant in counted))
    jobs = [MODELS[name] for name, _ in distinct], [variant for _, variant in distinct]
    # Half a minute for a step of SDXL.
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as executor:
        flops = dict(zip(distinct, executor.map(flops_per_pair, *jobs)))
    for result, *step in counted:
        result["mfu"] = flops[tuple(step)] * result["pairs_per_second"] / peak


def timing_table(results, device):
    rows = []
    for name, result in results.items():
        if "skipped" in result:
            rows.append([name, result["skipped"], "", "", ""])
            continue
        peak = f"{result['peak_memory_gb']:.1f}" if device == "cuda" else "not measured"
        numbers = [f"{result['seconds_per_step']:.3f}", f"{result['pairs_per_second']:.2f}", peak]
        rows.append([name, *numbers, f"{result['mfu']:.1%}"])
    return step_cost_tables.table(["step", "seconds", "pairs per second", "peak memory, GB", "MFU"], rows)


def write_json(path, report):
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def main_time(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.model != ["small"]:
        raise SystemExit("Without a GPU only `--model small` can be timed.")
    torch.manual_seed(0)
    peak, peak_is_of = peak_flops(device)
    packages = ("torch", "diffusers", "peft", *["bitsandbytes"] * has_8bit_adam(device))
    report = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "precision": "bf16" if device == "cuda" else "fp32",
        "peak_tflops": peak / 1e12,
        "peak_is_of": peak_is_of,
        "gradient_checkpointing": args.gradient_checkpointing,
        "optimizer": "8-bit AdamW" if has_8bit_adam(device) else "AdamW",
        "steps": args.steps,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "models": {
            f"{name} × {batch_size}": {
                "model": name,
                "resolution": MODELS[name].resolution,
                "rank": MODELS[name].rank,
                "batch_size": batch_size,
                "results": {},
            }
            for name in args.model
            for batch_size in MODELS[name].batch_sizes
        },
    }
    for model, batch_size, results in time_models(device, args):
        key = f"{model} × {batch_size}"
        for name, result in results.items():
            print(f"{key}, {name}: {', '.join(f'{k} {v}' for k, v in result.items())}", file=sys.stderr, flush=True)
        report["models"][key]["results"] |= results
        # As it goes, for it may be cut off.
        write_json(args.json, report)
    add_mfu(report["models"], peak)
    write_json(args.json, report)

    print(", ".join(f"{name} {value}" for name, value in report.items() if name not in ("versions", "models")))
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()), end="\n\n")
    for part in report["models"].values():
        results = part["results"]
        print(f"{part['model']}, {part['resolution']}², rank {part['rank']}, {part['batch_size']} pairs per step\n")
        print(timing_table(results, device), end="\n\n")
        for name in ("NCP-DPO, the authors' way", "latent DPO, VAE in the loop"):
            rates = [results[which].get("pairs_per_second") for which in ("NCP-DPO", name)]
            if all(rates):
                print(f"NCP-DPO makes {rates[0] / rates[1]:.2f} times the pairs per second of: {name}")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("count", help="FLOPs, memory, bytes and kernels, counted without a GPU; writes the tables")
    timing = modes.add_parser("time", help="time and memory, measured")
    timing.add_argument("--model", choices=list(MODELS), nargs="+", default=["sdxl", "sd15"])
    timing.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="default: yes, but not for small"
    )
    timing.add_argument("--steps", type=int, default=5, help=f"measured steps, after {WARM_UP_STEPS} to warm up")
    timing.add_argument("--json", type=Path, default=None, help="file to write the results to")
    args = parser.parse_args(input_args)
    if args.mode == "time" and args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.model != ["small"]
    return args


if __name__ == "__main__":
    args = parse_args()
    logging.set_verbosity_error()
    {"count": main_count, "time": main_time}[args.mode](args)
