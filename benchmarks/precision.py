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

"""Measures how well half precision computes the perceptual error, its gradient and the margin of eq. 13.

    python benchmarks/precision.py                                # random weights, some minutes on a CPU
    python benchmarks/precision.py --model PATH --json FILE       # real weights, by timestep; full-size models need a GPU

Every variant is compared with the paper's formula in float64. The weights are exact in all precisions, so only the
arithmetic differs. The random U-Nets have the blocks of Stable Diffusion 1.5 and SDXL and fewer channels. A real model gets
images that it has generated and makes its own predictions. A small random LoRA is the difference of policy and reference.
"""

import argparse
import copy
import functools
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from tqdm.auto import tqdm

from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ncp_loss import Denoising, NoiseConditionedPerception, preference_loss  # noqa: E402


TIMESTEPS = (1, 50, 250, 500, 750, 950)
SCHEDULERS = {
    prediction_type: DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    for prediction_type in ("epsilon", "v_prediction")
}
PREDICTION_RMS = (0.3, 0.05)
RESOLUTION = 16
# For a real model: the number of timestep ranges, and the prompts of its images.
NUM_BINS = 8
PROMPTS = (
    "a photograph of a red bicycle leaning on a brick wall",
    "an oil painting of a harbour at dawn, fishing boats, fog",
    "a portrait of an old sailor with a white beard",
    "a bowl of oranges on a wooden table, soft light",
    "a robot that waters flowers on a balcony",
    "a narrow street in the rain at night, neon signs",
    "a watercolour of two foxes in the snow",
    "a castle on a cliff above the sea, dramatic clouds",
)


class Variant(NamedTuple):
    dtype: torch.dtype
    probe_rms: float | None = None  # as in `NoiseConditionedPerception`; 0 is the formula as printed


VARIANTS = {
    "literal fp32": Variant(torch.float32, 0),
    "literal fp16": Variant(torch.float16, 0),
    "literal bf16": Variant(torch.bfloat16, 0),
    "default fp16": Variant(torch.float16),
    "default bf16": Variant(torch.bfloat16),
}


class Precision(NamedTuple):
    """How well a variant agrees with the exact formula. The `dict`s have the rms of the prediction error as keys."""

    mean_cosine: dict  # of ∂e/∂pred with the exact gradient, the mean over the samples
    min_cosine: dict  # the smallest over the samples
    mean_error: dict  # of e, relative to the exact one, the mean over the samples
    correlation: float  # of the margins with the exact ones
    right_sign: float  # the share of pairs whose margin has the sign of the exact one
    zeros: float  # the share of elements of ∂e/∂pred that are exactly zero


class Comparison(NamedTuple):
    """The same of one batch, with a value for each sample or pair."""

    cosine: torch.Tensor
    error: torch.Tensor
    zeros: torch.Tensor
    margin: torch.Tensor


class Batch(NamedTuple):
    """Winners first, then their losers, in float64."""

    x_t: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    condition: tuple  # the text embeddings, and SDXL's `added_cond_kwargs` or `None`
    variance_noise: torch.Tensor  # z of eq. 12


def sd15_shaped_unet(width):
    return UNet2DConditionModel(
        sample_size=RESOLUTION,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def sdxl_shaped_unet(width):
    return UNet2DConditionModel(
        sample_size=RESOLUTION,
        block_out_channels=(width, 2 * width, 4 * width),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=(width // 16, width // 8, width // 4),
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
    )


UNETS = {"SD1.5": sd15_shaped_unet, "SDXL": sdxl_shaped_unet}


def exact_in_half(x):
    """Rounds to numbers that float16 and bfloat16 can both represent."""
    return x.bfloat16().half()


class _Stop(Exception):
    pass


def literal_features(unet, x, timesteps, encoder_hidden_states, added_cond_kwargs):
    """Output of the mid block from the U-Net's own forward pass, which is stopped before the up blocks."""
    captured = []

    def stop(module, inputs, output):
        captured.append(output)
        raise _Stop

    handle = unet.mid_block.register_forward_hook(stop)
    try:
        unet(x, timesteps, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return captured[0]


def literal_step(prediction, batch, scheduler):
    """x_{t'} of eq. 12."""
    alphas_cumprod = scheduler.alphas_cumprod.double().to(batch.timesteps.device)
    abar, abar_previous = (alphas_cumprod[t].view(-1, 1, 1, 1) for t in (batch.timesteps, batch.timesteps - 1))
    alpha = abar / abar_previous
    if scheduler.config.prediction_type == "v_prediction":
        prediction = abar.sqrt() * prediction + (1 - abar).sqrt() * batch.x_t
    sigma = ((1 - abar_previous) / (1 - abar) * (1 - alpha)).sqrt()
    mean = (batch.x_t - (1 - alpha) / (1 - abar).sqrt() * prediction) / alpha.sqrt()
    return mean + sigma * batch.variance_noise


def literal_errors(unet, predictions, batch, scheduler):
    """Eq. 13 in float64 for each of `predictions`, and the gradient of the first error."""

    def features(prediction):
        x = literal_step(prediction, batch, scheduler)
        return literal_features(unet, x, batch.timesteps - 1, *batch.condition)

    with torch.no_grad():
        target_features = features(batch.target)
    errors, gradient = [], None
    for prediction in predictions:
        prediction = prediction.detach().requires_grad_(gradient is None)
        with torch.set_grad_enabled(prediction.requires_grad):
            errors.append((features(prediction) - target_features).square().mean(dim=(1, 2, 3)))
        if gradient is None:
            gradient = torch.autograd.grad(errors[0].sum(), prediction)[0]
    return [error.detach() for error in errors], gradient


def cosine_of(a, b):
    # F.cosine_similarity replaces norms below 1e-8, and the norm of the exact gradient is smaller.
    a, b = a.flatten(1), b.flatten(1)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-300)


def add_random_lora(unet, lora_std):
    """Adds a small random LoRA and switches it off."""
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=lora_std)
    unet.requires_grad_(False)
    unet.disable_adapters()


@torch.no_grad()
def predict(unet, x_t, timesteps, condition):
    """The predictions with the LoRA and without it."""
    predictions = []
    for switch in (unet.enable_adapters, unet.disable_adapters):
        switch()
        predictions.append(unet(x_t, timesteps, condition[0], added_cond_kwargs=condition[1]).sample)
    unet.requires_grad_(False)
    return predictions


def accumulate_in_float32(unet):
    """
    Gives `unet` the half-precision arithmetic of a GPU: exact products are summed in float32, and the sum is rounded once.
    The half-precision arithmetic of a CPU without instructions for it takes up to sixty times as long.
    """

    def conv2d(module, x):
        return module._conv_forward(x.float(), module.weight.float(), module.bias.float()).to(x.dtype)

    def linear(module, x):
        bias = None if module.bias is None else module.bias.float()
        return F.linear(x.float(), module.weight.float(), bias).to(x.dtype)

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.forward = functools.partial(conv2d, module)
        elif isinstance(module, torch.nn.Linear):
            module.forward = functools.partial(linear, module)
    return unet


def gradient_of(perception, anchor, prediction):
    prediction = prediction.float().requires_grad_(True)
    errors = perception.error(prediction, anchor)
    errors.sum().backward()
    return errors.detach(), prediction.grad


def compare(variants, unets, exact, scheduler, batch, predictions):
    """
    Compares variants on a batch.

    Args:
        variants (`dict` of `Variant`): the variants by name.
        unets (`dict` of `UNet2DConditionModel`): the U-Net for each dtype of the variants.
        exact (`UNet2DConditionModel`): the U-Net in float64.
        scheduler (`DDPMScheduler`): of one of the prediction types "epsilon" and "v_prediction".
        batch (`Batch`): the inputs.
        predictions (pair of `torch.Tensor`): the policy's and the reference's, in float64.

    Returns:
        `Comparison`s by the names of `variants`, and the exact margins. The unit of margins is the pair's own error.
    """
    (e, r), gradient = literal_errors(exact, predictions, batch, scheduler)
    policy_pred, ref_pred = predictions
    encoder_hidden_states, added = batch.condition
    inputs = {
        "noisy_latents": batch.x_t.float(),
        "timesteps": batch.timesteps,
        "target": batch.target.float(),
        "encoder_hidden_states": encoder_hidden_states.float(),
        "added_cond_kwargs": added and {name: value.float() for name, value in added.items()},
        "variance_noise": batch.variance_noise.float(),
    }

    def margin_of(errors, ref_errors):
        # The size of errors varies a thousandfold with the timestep.
        return preference_loss(errors.double(), ref_errors.double()).margin / r.view(2, -1).mean(dim=0)

    compared = {}
    for name, variant in variants.items():
        perception = NoiseConditionedPerception(unets[variant.dtype], scheduler, probe_rms=variant.probe_rms)
        anchor_without_reference = perception.anchor(Denoising(**inputs))
        results = [gradient_of(perception, anchor_without_reference, policy_pred)]
        if variant.probe_rms == 0:
            # As the formula is printed: two errors, each rounded by itself.
            with torch.no_grad():
                ref_errors = perception.error(ref_pred.float(), anchor_without_reference)
        else:
            anchor = perception.anchor(Denoising(**inputs), ref_pred.float())
            ref_errors = anchor.ref_errors
            results.append(gradient_of(perception, anchor, policy_pred))
        compared[name] = Comparison(
            cosine=torch.cat([cosine_of(g.double(), gradient) for _, g in results]),
            error=torch.cat([(errors.double() / e - 1).abs() for errors, _ in results]),
            zeros=torch.stack([(g == 0).double().mean() for _, g in results]),
            margin=margin_of(results[-1][0], ref_errors),
        )
    return compared, margin_of(e, r)


def correlation_of(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def measure(variants=VARIANTS, pairs=1, width=64, lora_std=0.02, seed=0):
    """
    Compares variants on random U-Nets of both shapes, at all timesteps, with both prediction types and prediction errors.

    Args:
        variants (`dict` of `Variant`): the variants by name.
        pairs (`int`): the number of pairs per combination of the above.
        width (`int`): channels of the U-Nets' first block.
        lora_std (`float`): standard deviation of the up-weights of the LoRA that the policy has and the reference has not.

    Returns:
        `dict` of `Precision`: by the names of `variants`.
    """
    torch.manual_seed(seed)
    cosines, errors, margins, zeros = ({name: [] for name in variants} for _ in range(4))
    exact_margins = []
    # Winners first, then losers. A pair shares timestep, noise and variance noise.
    timesteps = torch.tensor(TIMESTEPS * pairs * 2)
    n = len(timesteps)
    for make_unet in UNETS.values():
        base = make_unet(width).requires_grad_(False)
        for parameter in base.parameters():
            parameter.data = exact_in_half(parameter.data).float()
        exact = copy.deepcopy(base).double()
        unets = {variant.dtype: copy.deepcopy(base).to(variant.dtype) for variant in variants.values()}
        for dtype in unets.keys() & {torch.float16, torch.bfloat16}:
            accumulate_in_float32(unets[dtype])
        added = None
        if base.config.addition_embed_type:
            added = {
                "text_embeds": exact_in_half(torch.randn(n, 64)).double(),
                "time_ids": torch.tensor([[1024.0, 768.0, 0.0, 128.0, 1024.0, 1024.0]] * n).double(),
            }
        condition = (exact_in_half(torch.randn(n, 77, 64)).double(), added)
        x0 = torch.randn(n, 4, RESOLUTION, RESOLUTION).double()
        noise = torch.randn(n // 2, 4, RESOLUTION, RESOLUTION).double().repeat(2, 1, 1, 1)
        variance_noise = torch.randn(n // 2, 4, RESOLUTION, RESOLUTION).double().repeat(2, 1, 1, 1)
        x_t = SCHEDULERS["epsilon"].add_noise(x0, noise, timesteps).float().double()
        add_random_lora(exact, lora_std)
        change = torch.sub(*predict(exact, x_t, timesteps, condition))
        for prediction_type, scheduler in SCHEDULERS.items():
            target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, timesteps)
            target = target.float().double()
            for rms in PREDICTION_RMS:
                # The predictions of a random U-Net say nothing, so white noise replaces the reference's error. The change
                # by the LoRA is real.
                ref_pred = (target + rms * torch.randn(target.shape)).float().double()
                predictions = ((ref_pred + change).float().double(), ref_pred)
                batch = Batch(x_t, timesteps, target, condition, variance_noise)
                compared, margin = compare(variants, unets, exact, scheduler, batch, predictions)
                margin_rms = margin.square().mean().sqrt()
                exact_margins.append(margin / margin_rms)
                for name, comparison in compared.items():
                    cosines[name].append((rms, comparison.cosine))
                    errors[name].append((rms, comparison.error))
                    zeros[name].append(comparison.zeros)
                    margins[name].append(comparison.margin / margin_rms)

    def at(rms, values):
        return torch.cat([value for value_rms, value in values if value_rms == rms])

    exact_margin = torch.cat(exact_margins)
    result = {}
    for name in variants:
        margin = torch.cat(margins[name])
        result[name] = Precision(
            mean_cosine={rms: at(rms, cosines[name]).mean().item() for rms in PREDICTION_RMS},
            min_cosine={rms: at(rms, cosines[name]).min().item() for rms in PREDICTION_RMS},
            mean_error={rms: at(rms, errors[name]).mean().item() for rms in PREDICTION_RMS},
            correlation=correlation_of(margin, exact_margin),
            right_sign=(margin.sign() == exact_margin.sign()).double().mean().item(),
            zeros=torch.cat(zeros[name]).mean().item(),
        )
    return result


def encoder_of(unet, dtype):
    """A copy in `dtype` without the up blocks, which the perceptual error does not need."""
    up_blocks, unet.up_blocks = unet.up_blocks, torch.nn.ModuleList()
    encoder = copy.deepcopy(unet).to(dtype)
    unet.up_blocks = up_blocks
    if dtype in (torch.float16, torch.bfloat16) and unet.device.type == "cpu":
        accumulate_in_float32(encoder)
    return encoder


@torch.no_grad()
def draw_pairs(pipeline, num_pairs, resolution, seed):
    """Generates two images per prompt. Yields their latents, `(2, C, h, w)`, and the prompt's condition, in float64."""
    options = {"height": resolution, "width": resolution, "num_inference_steps": 20, "output_type": "latent"}
    for index in range(num_pairs):
        prompt = PROMPTS[index % len(PROMPTS)]
        generator = torch.Generator().manual_seed(seed + index)
        x0 = pipeline(prompt, num_images_per_prompt=2, generator=generator, **options).images
        encoded = pipeline.encode_prompt(
            prompt, device=x0.device, num_images_per_prompt=2, do_classifier_free_guidance=False
        )
        added = None
        if pipeline.unet.config.addition_embed_type is not None:
            time_ids = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * 2, device=x0.device)
            added = {"text_embeds": exact_in_half(encoded[2]).double(), "time_ids": time_ids.double()}
        yield x0.double(), (exact_in_half(encoded[0]).double(), added)


def measure_model(model, variants=VARIANTS, pairs=len(PROMPTS), lora_std=0.02, seed=0, device="cpu"):
    """
    Compares variants on the weights of a model in each of `NUM_BINS` ranges of timesteps.

    Yields:
        The range ("0-124") and, for each variant, the fields of `Precision` but `zeros`, as numbers.
    """
    torch.manual_seed(seed)
    # With TF32, fp32 would be another precision.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline = DiffusionPipeline.from_pretrained(model).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    unet, scheduler = pipeline.unet.requires_grad_(False), DDPMScheduler.from_config(pipeline.scheduler.config)
    for parameter in unet.parameters():
        parameter.data = exact_in_half(parameter.data).float()
    # SDXL's own resolution takes four times the time and memory.
    resolution = min(unet.config.sample_size * pipeline.vae_scale_factor, 512)
    drawn = list(draw_pairs(pipeline, pairs, resolution, seed))
    unets = {dtype: encoder_of(unet, dtype) for dtype in {torch.float64, *(v.dtype for v in variants.values())}}
    add_random_lora(unet, lora_std)

    num_timesteps = scheduler.config.num_train_timesteps
    for index in tqdm(range(NUM_BINS), desc="Timesteps"):
        first, last = (num_timesteps * i // NUM_BINS for i in (index, index + 1))
        results = []
        for x0, condition in drawn:
            timesteps = torch.randint(max(first, 1), last, (1,)).repeat(2).to(device)
            noise = torch.randn(1, *x0.shape[1:]).to(x0).repeat(2, 1, 1, 1)
            variance_noise = torch.randn(1, *x0.shape[1:]).to(x0).repeat(2, 1, 1, 1)
            x_t = scheduler.add_noise(x0, noise, timesteps).float()
            target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, timesteps)}
            added = condition[1] and {name: value.float() for name, value in condition[1].items()}
            predictions = [p.double() for p in predict(unet, x_t, timesteps, (condition[0].float(), added))]
            target = target[scheduler.config.prediction_type].float().double()
            batch = Batch(x_t.double(), timesteps, target, condition, variance_noise)
            results.append(compare(variants, unets, unets[torch.float64], scheduler, batch, predictions))
        exact_margin = torch.cat([margin for _, margin in results])
        measured = {}
        for name in variants:
            cosine, error, _, margin = map(torch.cat, zip(*(compared[name] for compared, _ in results)))
            measured[name] = {
                "mean_cosine": cosine.mean().item(),
                "min_cosine": cosine.min().item(),
                "mean_error": error.mean().item(),
                "correlation": correlation_of(margin, exact_margin),
                "right_sign": (margin.sign() == exact_margin.sign()).double().mean().item(),
            }
        yield f"{first}-{last - 1}", measured


def markdown(result):
    """A table of `Precision`s. The columns of cosines are for the two sizes of the prediction error."""
    columns = [f"{kind} cosine, rms {rms}" for rms in PREDICTION_RMS for kind in ("mean", "smallest")]
    lines = [f"| | {' | '.join(columns)} | error of `e` | correlation of margins | right sign |", "|---" * 8 + "|"]
    for name, p in result.items():
        cosines = " | ".join(f"{p.mean_cosine[rms]:.4f} | {p.min_cosine[rms]:.4f}" for rms in PREDICTION_RMS)
        error = sum(p.mean_error.values()) / len(p.mean_error)
        lines.append(f"| {name} | {cosines} | {error:.2%} | {p.correlation:.4f} | {p.right_sign:.1%} |")
    return "\n".join(lines)


def model_markdown(bins):
    """A table of the results of `measure_model`."""
    lines = [
        "| timesteps | | mean cosine | smallest cosine | error of `e` | correlation of margins | right sign |",
        "|---" * 7 + "|",
    ]
    for span, result in bins.items():
        for name, values in result.items():
            cosines = f"{values['mean_cosine']:.4f} | {values['min_cosine']:.4f}"
            numbers = f"{values['mean_error']:.2%} | {values['correlation']:.4f} | {values['right_sign']:.1%}"
            lines.append(f"| {span} | {name} | {cosines} | {numbers} |")
    return "\n".join(lines)


def main(args):
    start = time.perf_counter()
    if args.model is None:
        print(markdown(measure(pairs=args.pairs or 2, width=args.width, lora_std=args.lora_std, seed=args.seed)))
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers")}
        report = {"device": name, "versions": versions, "model": Path(args.model).name, "bins": {}}
        pairs = args.pairs or len(PROMPTS)
        for span, measured in measure_model(args.model, VARIANTS, pairs, args.lora_std, args.seed, device):
            report["bins"][span] = measured
            # The file is written after each range, because the run may be interrupted.
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(model_markdown(report["bins"]))
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a Stable Diffusion model; default: random weights")
    parser.add_argument("--json", type=Path, help="file for the results of --model")
    parser.add_argument(
        "--pairs", type=int, help="number of pairs; default: 2 per timestep, prediction type and U-Net, 8 per range"
    )
    parser.add_argument("--width", type=int, default=64, help="channels of the random U-Nets' first block")
    parser.add_argument("--lora_std", type=float, default=0.02, help="standard deviation of the LoRA's up-weights")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
