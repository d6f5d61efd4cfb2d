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

"""How well half precision computes the perceptual error, its gradient and the margin of eq. 13.

    python benchmarks/precision.py                                # random weights, some minutes on a CPU
    python benchmarks/precision.py --model PATH --json FILE       # real weights, by timestep; a GPU for full-size models

prints every way of computing them against the paper's formula, literally, in float64. Weights are exact in every precision
compared, so that only the arithmetic differs. The random U-Nets have the blocks of Stable Diffusion 1.5 and SDXL and fewer
channels. A real one is shown pictures that it has drawn itself, and its own predictions; policy and reference differ by a small
random LoRA in both.
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

from ncp_loss import NoiseConditionedPerception, preference_loss  # noqa: E402


TIMESTEPS = (1, 50, 250, 500, 750, 950)
SCHEDULERS = {
    prediction_type: DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    for prediction_type in ("epsilon", "v_prediction")
}
PREDICTION_RMS = (0.3, 0.05)
RESOLUTION = 16
# For a real model: bins of timesteps, and what it draws.
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
    probe_rms: float | None = None  # as in `NoiseConditionedPerception`: 0 is the literal formula


VARIANTS = {
    "literal fp32": Variant(torch.float32, 0),
    "literal fp16": Variant(torch.float16, 0),
    "literal bf16": Variant(torch.bfloat16, 0),
    "default fp16": Variant(torch.float16),
    "default bf16": Variant(torch.bfloat16),
}


class Precision(NamedTuple):
    min_cosine: dict  # of ∂e/∂pred with the exact one, the smallest over samples; by prediction-error rms
    mean_error: dict  # of e, relative to the exact one, mean over samples; by prediction-error rms
    correlation: float  # of the margins with the exact ones
    right_sign: float  # share of pairs whose margin has the exact one's sign
    zeros: float  # share of elements of ∂e/∂pred that are exactly zero


class Comparison(NamedTuple):
    """Of one variant with the exact formula, for a batch: as in `Precision`, of each sample and pair."""

    cosine: torch.Tensor
    error: torch.Tensor
    zeros: torch.Tensor
    margin: torch.Tensor


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
    """Rounds to what float16 and bfloat16 both represent."""
    return x.bfloat16().half()


class _Stop(Exception):
    pass


def literal_features(unet, x, timesteps, encoder_hidden_states, added_cond_kwargs):
    """Output of the mid block, from the U-Net's own forward; the up blocks never run."""
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


def literal_step(prediction, x_t, timesteps, scheduler):
    """Eq. 12 with z = 0."""
    alphas_cumprod = scheduler.alphas_cumprod.double().to(timesteps.device)
    abar, abar_previous = (alphas_cumprod[t].view(-1, 1, 1, 1) for t in (timesteps, timesteps - 1))
    alpha = abar / abar_previous
    if scheduler.config.prediction_type == "v_prediction":
        prediction = abar.sqrt() * prediction + (1 - abar).sqrt() * x_t
    return (x_t - (1 - alpha) / (1 - abar).sqrt() * prediction) / alpha.sqrt()


def literal_errors(unet, predictions, x_t, timesteps, target, condition, scheduler):
    """Eq. 13 in float64 for each of `predictions`, with the gradient for the first."""
    with torch.no_grad():
        seen = literal_features(unet, literal_step(target, x_t, timesteps, scheduler), timesteps - 1, *condition)
    errors, gradient = [], None
    for prediction in predictions:
        prediction = prediction.detach().requires_grad_(gradient is None)
        with torch.set_grad_enabled(prediction.requires_grad):
            features = literal_features(
                unet, literal_step(prediction, x_t, timesteps, scheduler), timesteps - 1, *condition
            )
            errors.append((features - seen).square().mean(dim=(1, 2, 3)))
        if gradient is None:
            gradient = torch.autograd.grad(errors[0].sum(), prediction)[0]
    return [error.detach() for error in errors], gradient


def cosine_of(a, b):
    # F.cosine_similarity takes norms below 1e-8 for zero, and the exact gradient's is smaller.
    a, b = a.flatten(1), b.flatten(1)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-300)


def add_random_lora(unet, lora_std):
    """A small random LoRA that is switched off."""
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=lora_std)
    unet.requires_grad_(False)
    unet.disable_adapters()


@torch.no_grad()
def predict(unet, x_t, timesteps, condition):
    """With the LoRA, and without."""
    predictions = []
    for switch in (unet.enable_adapters, unet.disable_adapters):
        switch()
        predictions.append(unet(x_t, timesteps, condition[0], added_cond_kwargs=condition[1]).sample)
    unet.requires_grad_(False)
    return predictions


def accumulate_in_float32(unet):
    """
    Gives `unet` a GPU's half-precision arithmetic: exact products, summed in float32, rounded once. A CPU's own takes up to
    sixty times as long as that, where it has no instructions for it.
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


def compare(variants, unets, exact, scheduler, x_t, timesteps, target, predictions, condition):
    """
    Compares variants on a batch, winners first, in float64: `predictions` are the policy's and the reference's, `unets` by the
    variants' dtypes, `exact` in float64.

    Returns:
        `Comparison`s by the names of `variants`, and the exact margins, all in units of the pair's own error.
    """
    (e, r), gradient = literal_errors(exact, predictions, x_t, timesteps, target, condition, scheduler)
    policy_pred, ref_pred = predictions

    def margin_of(errors, ref_errors):
        # The unit varies a thousandfold with the timestep.
        return preference_loss(errors.double(), ref_errors.double()).margin / r.view(2, -1).mean(dim=0)

    compared = {}
    for name, variant in variants.items():
        perception = NoiseConditionedPerception(unets[variant.dtype], scheduler, probe_rms=variant.probe_rms)
        inputs = (x_t.float(), timesteps, target.float(), condition[0].float())
        kwargs = {"added_cond_kwargs": condition[1] and {key: value.float() for key, value in condition[1].items()}}
        alone = perception.anchor(*inputs, **kwargs)
        results = [gradient_of(perception, alone, policy_pred)]
        if variant.probe_rms == 0:
            # As the formula is written: two errors, each rounded by itself.
            with torch.no_grad():
                ref_errors = perception.error(ref_pred.float(), alone)
        else:
            anchor = perception.anchor(*inputs, **kwargs, ref_pred=ref_pred.float())
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
    Compares variants on random U-Nets of both shapes, both prediction types, all timesteps and both prediction errors.

    Args:
        variants (`dict` of `Variant`): what to compare.
        pairs (`int`): pairs per combination of the above.
        width (`int`): channels of the U-Nets' first block.
        lora_std (`float`): standard deviation of the up-weights of the LoRA by which policy and reference differ.

    Returns:
        `dict` of `Precision`: by the names of `variants`.
    """
    torch.manual_seed(seed)
    cosines, errors, margins, zeros = ({name: [] for name in variants} for _ in range(4))
    exact_margins = []
    # Winners first, then losers, which share timestep and noise.
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
        x_t = SCHEDULERS["epsilon"].add_noise(x0, noise, timesteps).float().double()
        add_random_lora(exact, lora_std)
        change = torch.sub(*predict(exact, x_t, timesteps, condition))
        for prediction_type, scheduler in SCHEDULERS.items():
            target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, timesteps)
            target = target.float().double()
            for rms in PREDICTION_RMS:
                # A random U-Net's own error is that of no training at all. White noise of the size of a trained one's
                # stands in for it; what the LoRA changes is real.
                ref_pred = (target + rms * torch.randn(target.shape)).float().double()
                predictions = ((ref_pred + change).float().double(), ref_pred)
                batch = x_t, timesteps, target, predictions, condition
                compared, margin = compare(variants, unets, exact, scheduler, *batch)
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
            min_cosine={rms: at(rms, cosines[name]).min().item() for rms in PREDICTION_RMS},
            mean_error={rms: at(rms, errors[name]).mean().item() for rms in PREDICTION_RMS},
            correlation=correlation_of(margin, exact_margin),
            right_sign=(margin.sign() == exact_margin.sign()).double().mean().item(),
            zeros=torch.cat(zeros[name]).mean().item(),
        )
    return result


def encoder_of(unet, dtype):
    """A copy without the up blocks, which the perceptual error does not run."""
    up_blocks, unet.up_blocks = unet.up_blocks, torch.nn.ModuleList()
    encoder = copy.deepcopy(unet).to(dtype)
    unet.up_blocks = up_blocks
    if dtype in (torch.float16, torch.bfloat16) and unet.device.type == "cpu":
        accumulate_in_float32(encoder)
    return encoder


@torch.no_grad()
def draw_pairs(pipeline, num_pairs, resolution, seed):
    """Pairs of pictures of one prompt each as latents `(2, C, h, w)`, and what the U-Net takes for the prompt, in float64."""
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
    Compares variants on the weights of a model, rounded to what all dtypes have in common, in bins of timesteps.

    Yields:
        A bin ("0-124") and, by variant, "min_cosine" and "mean_error" over samples, "correlation" and "right_sign" of margins.
    """
    torch.manual_seed(seed)
    # TF32 would make fp32 another precision.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    unet, scheduler = pipeline.unet.requires_grad_(False), DDPMScheduler.from_config(pipeline.scheduler.config)
    for parameter in unet.parameters():
        parameter.data = exact_in_half(parameter.data).float()
    # SDXL's own takes four times the time, and its memory in float64.
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
            x_t = scheduler.add_noise(x0, noise, timesteps).float()
            target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, timesteps)}
            added = condition[1] and {name: value.float() for name, value in condition[1].items()}
            predictions = [p.double() for p in predict(unet, x_t, timesteps, (condition[0].float(), added))]
            target = target[scheduler.config.prediction_type].float().double()
            batch = x_t.double(), timesteps, target, predictions, condition
            results.append(compare(variants, unets, unets[torch.float64], scheduler, *batch))
        exact_margin = torch.cat([margin for _, margin in results])
        measured = {}
        for name in variants:
            cosine, error, _, margin = map(torch.cat, zip(*(compared[name] for compared, _ in results)))
            measured[name] = {
                "min_cosine": cosine.min().item(),
                "mean_error": error.mean().item(),
                "correlation": correlation_of(margin, exact_margin),
                "right_sign": (margin.sign() == exact_margin.sign()).double().mean().item(),
            }
        yield f"{first}-{last - 1}", measured


def markdown(result):
    lines = [
        "| | cosine, rms 0.3 | cosine, rms 0.05 | error of `e` | correlation of margins | right sign |",
        "|---|---|---|---|---|---|",
    ]
    for name, p in result.items():
        error = sum(p.mean_error.values()) / len(p.mean_error)
        lines.append(
            f"| {name} | {p.min_cosine[0.3]:.4f} | {p.min_cosine[0.05]:.4f} | {error:.2%} | {p.correlation:.4f} |"
            f" {p.right_sign:.1%} |"
        )
    return "\n".join(lines)


def model_markdown(bins):
    lines = [
        "| timesteps | | smallest cosine | error of `e` | correlation of margins | right sign |",
        "|---|---|---|---|---|---|",
    ]
    for span, result in bins.items():
        for name, values in result.items():
            numbers = f"{values['min_cosine']:.4f} | {values['mean_error']:.2%} | {values['correlation']:.4f}"
            lines.append(f"| {span} | {name} | {numbers} | {values['right_sign']:.1%} |")
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
            # As it goes, for it may be cut off.
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(model_markdown(report["bins"]))
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a Stable Diffusion, instead of random weights")
    parser.add_argument("--json", type=Path, help="file to write the model's results to")
    parser.add_argument("--pairs", type=int, help="per timestep, prediction type and U-Net (2), or per bin (8)")
    parser.add_argument("--width", type=int, default=64, help="channels of the random U-Nets' first block")
    parser.add_argument("--lora_std", type=float, default=0.02, help="size of the LoRA's up-weights")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
