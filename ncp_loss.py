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

"""Preference losses in the feature space of a frozen U-Net's encoder.

Equation numbers are those of "Aligning Diffusion Models with Noise-Conditioned Perception" (arXiv:2406.17636 v2).

The perceptual error compares the latents of the next timestep that follow from the prediction with those that follow
from the target. These latents are linear in the prediction,

    x_{t'}(pred) = x_{t'}(center_pred) + k_t * (pred - center_pred)

so the error is a finite difference of the encoder f. In fp64 it is computed as printed (eq. 13). k_t is only 0.001 to
0.03, and half precision cannot resolve such a step. There the step is multiplied by a factor s without gradient, and
the difference of the features is divided by s. To first order the result is the same. Differences are central there: both
sides run forward, and one of them backward. A fair coin chooses it, so the mean of the gradient is that of both sides.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


LAYERS = ("mid", "down")
TARGET_TIMESTEPS = ("previous", "current", "zero")
DEFAULT_PROBE_RMS = {torch.float32: 5e-4, torch.float16: 0.03, torch.bfloat16: 0.06}
REFERENCE_ADAPTER = "reference"  # the PEFT adapter that `reference_model` switches to


def latent_error(model_pred, target):
    """
    Mean squared error of each sample's prediction, `(N,)`, in at least float32: the latent-space counterpart of
    [`NoiseConditionedPerception.error`]. `model_pred` and `target` have the shape `(N, C, H, W)`.
    """
    dtype = torch.promote_types(model_pred.dtype, torch.float32)
    return (model_pred.to(dtype) - target.to(dtype)).square().mean(dim=(1, 2, 3))


class Denoising(NamedTuple):
    """The U-Net's task for a batch of N images."""

    noisy_latents: torch.Tensor  # x_t, (N, C, H, W)
    timesteps: torch.Tensor  # t, (N,)
    target: torch.Tensor  # the true noise, velocity or sample, (N, C, H, W)
    encoder_hidden_states: torch.Tensor  # the text embeddings, (N, L, D)
    added_cond_kwargs: dict | None = None  # SDXL's `text_embeds`, (N, P), and `time_ids`, (N, 6)
    variance_noise: torch.Tensor | None = None  # z of eq. 12, (N, C, H, W); without it 0

    def predict(self, unet):
        inputs = self.noisy_latents, self.timesteps, self.encoder_hidden_states
        return unet(*inputs, added_cond_kwargs=self.added_cond_kwargs).sample


class Errors(NamedTuple):
    policy: torch.Tensor  # (N,), winners first
    reference: torch.Tensor | None  # (N,); `None` without its predictions


class LatentSpace:
    """The counterpart of [`NoiseConditionedPerception`]."""

    @staticmethod
    def errors(denoising, model_pred, ref_pred=None):
        """The `Errors` of predictions of shape `(N, C, H, W)`."""
        ref_errors = None if ref_pred is None else latent_error(ref_pred, denoising.target)
        return Errors(latent_error(model_pred, denoising.target), ref_errors)


class LossInputs(NamedTuple):
    """What a loss is computed from: tensors of shape `(B,)` and the loss's options."""

    errors_w: torch.Tensor  # e_w
    errors_l: torch.Tensor  # e_l
    margin: torch.Tensor  # m = (r_w - r_l) - (e_w - e_l); losses without a reference have r = 0
    logits: torch.Tensor  # z = ½·β·m
    beta: float  # β
    label_smoothing: float  # ε
    target_margin: float  # γ


class LossType(NamedTuple):
    function: Callable  # takes `LossInputs` and returns the pairs' losses, `(B,)`
    needs_reference: bool = True
    beta: float = 5000.0  # default β
    sft_weight: float | None = 0.0  # default λ; `None` if the loss has no λ
    has_label_smoothing: bool = False
    uses_logits: bool = True  # whether β appears in z only


def _dpo(inputs):
    """-(1-ε)·log σ(z) - ε·log σ(-z) (eq. 18 and 19; arXiv:2311.12908, 2401.08417; ε: arXiv:2305.18290)"""
    smoothing = inputs.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(inputs.logits) - smoothing * F.logsigmoid(-inputs.logits)


def _ipo(inputs):
    """(z - ½)² (arXiv:2310.12036)"""
    return (inputs.logits - 0.5).square()


def _hinge(inputs):
    """max(0, 1 - z) (arXiv:2305.10425)"""
    return F.relu(1 - inputs.logits)


def _sft(inputs):
    """e_w"""
    return inputs.errors_w


def _simpo(inputs):
    """-log σ(z - γ) (arXiv:2405.14734)"""
    return -F.logsigmoid(inputs.logits - inputs.target_margin)


def _mapo(inputs):
    """e_w - β·log σ(T·(h(e_w) - h(e_l))), h(e) = s·e / (exp(s·e) - 1), s = ½, T = 1000 (arXiv:2406.06424)"""

    def h(errors):
        x = 0.5 * errors
        # Near 0, as at the first timestep, the formula is 0 / 0, so the series is used. exp(80) is still finite.
        large = x.clamp(0.01, 80)
        return torch.where(x < 0.01, 1 - x / 2 + x.square() / 12, large / torch.expm1(large))

    return inputs.errors_w - inputs.beta * F.logsigmoid(1000 * (h(inputs.errors_w) - h(inputs.errors_l)))


def _dmpo(inputs):
    """KL(σ(z) ‖ 1-α) = σ(z)·log(σ(z)/(1-α)) + σ(-z)·log(σ(-z)/α), α = 0.01 (arXiv:2507.07510)"""
    log_win, log_loss = F.logsigmoid(inputs.logits), F.logsigmoid(-inputs.logits)
    return log_win.exp() * (log_win - math.log(0.99)) + log_loss.exp() * (log_loss - math.log(0.01))


def _linear(inputs):
    """u·(e_w - e_l), u = clip(½ - 0.2·β·m, η, 1-η) held constant, η = 0.001 (arXiv:2605.21123, fixed reference)"""
    slope = (0.5 - 0.2 * inputs.beta * inputs.margin.detach()).clamp(0.001, 0.999)
    return slope * (inputs.errors_w - inputs.errors_l)


LOSSES = {
    "dpo": LossType(_dpo, has_label_smoothing=True),
    "ipo": LossType(_ipo),
    "hinge": LossType(_hinge),
    "cpo": LossType(_dpo, needs_reference=False, sft_weight=1.0, has_label_smoothing=True),
    "sft": LossType(_sft, needs_reference=False, sft_weight=None),
    "simpo": LossType(_simpo, needs_reference=False),
    "mapo": LossType(_mapo, needs_reference=False, beta=0.1, uses_logits=False),
    "dmpo": LossType(_dmpo),
    "linear": LossType(_linear, beta=100.0, uses_logits=False),
}


class PreferenceLoss(NamedTuple):
    loss: torch.Tensor  # the mean over the pairs, a scalar
    margin: torch.Tensor  # m, `(B,)`
    implicit_accuracy: torch.Tensor  # the share of pairs with m > 0, where a tie counts half, a scalar


def preference_loss(
    errors,
    ref_errors=None,
    loss_type="dpo",
    beta=None,
    sft_weight=None,
    label_smoothing=0.0,
    target_margin=1.0,
    winner_probability=None,
):
    r"""
    Preference loss of B pairs from the errors of their images: a loss of `LOSSES`, whose functions say their formula,
    plus λ·e_w. The errors may come from either space.

    Args:
        errors (`torch.Tensor` of shape `(2B,)`): the policy's errors, first of the B winners, then of their B losers.
        ref_errors (`torch.Tensor` of shape `(2B,)`, *optional*): the reference's errors, for losses with a reference.
        loss_type (`str`): a key of `LOSSES`.
        beta (`float`, *optional*): β, by default the loss's own. In most losses a smaller β permits a larger change.
        sft_weight (`float`, *optional*): λ, by default 1 for "cpo" and 0 for the others; "sft" has none.
        label_smoothing (`float`): ε in [0, 0.5), the share of labels assumed to be wrong ("dpo" and "cpo" only).
        target_margin (`float`): γ, the value that z should exceed ("simpo" only).
        winner_probability (`torch.Tensor` of shape `(B,)`, *optional*): p in [0, 1], the probability that the winner
            is the better image. A pair's loss is then p·loss + (1-p)·(its loss with winner and loser exchanged).

    Returns:
        `PreferenceLoss`. A `ValueError` names an argument that is out of range, missing, or not one of the loss.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"`loss_type` is {loss_type!r}, but must be one of {', '.join(LOSSES)}.")
    loss = LOSSES[loss_type]
    if errors.shape[0] % 2:
        raise ValueError(f"`errors` must hold as many winners as losers, but its length is {errors.shape[0]}.")
    if not loss.needs_reference:
        ref_errors = torch.zeros_like(errors)
    elif ref_errors is None:
        raise ValueError(f"`loss_type` {loss_type!r} needs `ref_errors`, the errors of the reference model.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` is {label_smoothing}, but must be in [0, 0.5).")
    if label_smoothing and not loss.has_label_smoothing:
        raise ValueError(f"`loss_type` {loss_type!r} has no `label_smoothing`; 'dpo' and 'cpo' have it.")
    if sft_weight is not None and loss.sft_weight is None:
        raise ValueError(f"`loss_type` {loss_type!r} has no `sft_weight`: it is the winner's error alone.")
    beta = loss.beta if beta is None else beta
    sft_weight = loss.sft_weight or 0.0 if sft_weight is None else sft_weight

    def losses_and_margin(errors, ref_errors):
        errors_w, errors_l = errors.chunk(2)
        ref_errors_w, ref_errors_l = ref_errors.chunk(2)
        margin = (ref_errors_w - ref_errors_l) - (errors_w - errors_l)
        inputs = LossInputs(errors_w, errors_l, margin, 0.5 * beta * margin, beta, label_smoothing, target_margin)
        return loss.function(inputs) + sft_weight * errors_w, margin

    losses, margin = losses_and_margin(errors, ref_errors)
    if winner_probability is not None:
        half = errors.shape[0] // 2
        exchanged_losses, _ = losses_and_margin(errors.roll(half, 0), ref_errors.roll(half, 0))
        losses = winner_probability * losses + (1 - winner_probability) * exchanged_losses
    return PreferenceLoss(losses.mean(), margin, (0.5 * (margin.sign() + 1)).mean())


def preference_metrics(error_w, error_l=None, ref_error_w=None, ref_error_l=None, **options):
    """
    Means over B pairs, floats by name, from errors of shape `(B,)`: the results of [`preference_loss`] with `options`, the
    errors, the drift (the policy's minus the reference's error; it grows before a run diverges), and where β scales
    logits their root mean square, `logit_spread`, and the share beyond ±5. Without `error_l` the loss is `error_w`.
    """
    metrics, ref_errors = {"loss": error_w, "error_w": error_w, "error_l": error_l}, None
    if ref_error_w is not None:
        metrics["drift_w"] = error_w - ref_error_w
    if error_l is not None:
        if ref_error_w is not None:
            ref_errors, metrics["drift_l"] = torch.cat([ref_error_w, ref_error_l]), error_l - ref_error_l
        result = preference_loss(torch.cat([error_w, error_l]), ref_errors, **options)
        metrics.update(result._asdict())
        if LOSSES[options["loss_type"]].uses_logits:
            logits = 0.5 * options["beta"] * result.margin
            metrics.update(logit_spread=logits.square().mean().sqrt(), saturated=(logits.abs() > 5).float())
    return {name: value.mean().item() for name, value in metrics.items() if value is not None}


def error_scale(latent_margins, feature_margins):
    """
    The factor ρ that gives margins in feature space the size they have in latent space, so that β, λ and the learning
    rate mean the same in both: log ρ = mean(log|m_latent| - log|m_feature|). Margins have heavy tails; their geometric
    mean is stable with a few hundred pairs, and their standard deviation is not.

    Args:
        latent_margins (`torch.Tensor` of shape `(B,)`): (r_w - r_l) - (e_w - e_l) in latent space, for a policy with a
            small random change, at evenly spread timesteps; `feature_margins`: with an `error_scale` of 1.

    Returns:
        `tuple[float, float]`: ρ and the standard error of log ρ. Pairs with a margin of 0 do not count; if fewer than
        two others are left, there is a `ValueError`.
    """
    log_ratios = latent_margins.double().abs().log() - feature_margins.double().abs().log()
    log_ratios = log_ratios[log_ratios.isfinite()]
    if len(log_ratios) < 2:
        raise ValueError(f"{len(log_ratios)} pairs have margins other than 0 in both spaces, but 2 are needed.")
    return log_ratios.mean().exp().item(), log_ratios.std().item() / math.sqrt(len(log_ratios))


def adapters_disabled(unet):
    """
    Context manager that turns off all PEFT adapters of a U-Net, if it has any. Blocks may be nested; `requires_grad`
    does not change. `unet` is the model itself, not a distributed wrapper.
    """
    return _switched_adapters(unet, None)


def reference_model(unet):
    """
    Context manager in which a U-Net with LoRAs predicts as the reference: layers with an adapter named "reference" use
    it alone, and the adapters of all other layers are off. Otherwise it is like [`adapters_disabled`].
    """
    return _switched_adapters(unet, REFERENCE_ADAPTER)


@contextlib.contextmanager
def perturbed_policy(unet, generator):
    """
    Context manager that adds a random update to the LoRA "default" of a U-Net: in each of its layers a change of 2 % of
    the weight's norm. `generator` is a `torch.Generator` on the CPU.
    """
    layers = list(_adapter_layers(unet))
    saved = [layer.lora_B["default"].weight.clone() for layer in layers]
    with torch.no_grad():
        for layer, original in zip(layers, saved):
            up = layer.lora_B["default"].weight
            up.copy_(torch.randn(up.shape, generator=generator))
            up *= 0.02 * layer.base_layer.weight.float().norm() / layer.get_delta_weight("default").norm()
            up += original
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, original in zip(layers, saved):
                layer.lora_B["default"].weight.copy_(original)


@contextlib.contextmanager
def _switched_adapters(unet, adapter_name):
    # PEFT's own switches visit all parameters, which takes 0.2 s in each step of SDXL.
    switches = [(layer, layer._disable_adapters, layer._active_adapter) for layer in _adapter_layers(unet)]
    for layer, _, _ in switches:
        layer._disable_adapters = adapter_name is None or adapter_name not in layer.r
        if not layer._disable_adapters:
            layer._active_adapter = [adapter_name]
    try:
        yield
    finally:
        for layer, disable_adapters, active_adapter in switches:
            layer._disable_adapters, layer._active_adapter = disable_adapters, active_adapter


def _adapter_layers(module):
    # All of PEFT's layers have this class attribute. The modules inside such a layer are not searched.
    if hasattr(type(module), "_disable_adapters"):
        yield module
    else:
        for child in module.children():
            yield from _adapter_layers(child)


class StepTable(NamedTuple):
    """The step x_{t'} = x_weight·x_t + pred_weight·pred + sigma·z (eq. 12) of every timestep t: float64, `(T,)`."""

    x_weight: torch.Tensor
    pred_weight: torch.Tensor
    sigma: torch.Tensor
    k: torch.Tensor  # k_t, the derivative of the compared latents
    timesteps: torch.Tensor  # t'

    @classmethod
    def from_scheduler(cls, noise_scheduler, target_timestep):
        """The table for `noise_scheduler`; a `ValueError` if the step to `target_timestep` is unknown or infinite."""
        if target_timestep not in TARGET_TIMESTEPS:
            raise ValueError(f"`target_timestep` is {target_timestep!r}, but must be previous, current or zero.")
        alpha_bar = noise_scheduler.alphas_cumprod.double().cpu()
        timesteps = torch.arange(alpha_bar.shape[0])
        zeros, ones = torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)

        # The predicted clean latents are a·x_t + b·pred.
        prediction_type = noise_scheduler.config.prediction_type
        if prediction_type == "epsilon":
            if alpha_bar[-1] == 0:
                raise ValueError("Zero terminal SNR (`rescale_betas_zero_snr`) rules out `prediction_type` epsilon.")
            a, b = alpha_bar.rsqrt(), -((1 - alpha_bar) / alpha_bar).sqrt()
        elif prediction_type == "v_prediction":
            a, b = alpha_bar.sqrt(), -(1 - alpha_bar).sqrt()
        elif prediction_type == "sample":
            a, b = zeros, ones
        else:
            raise ValueError(f"`prediction_type` is {prediction_type!r}, but must be epsilon, v_prediction or sample.")
        if target_timestep == "zero":
            return cls(a, b, zeros, b, torch.zeros_like(timesteps))

        # DDPM's posterior q(x_{t'} | x_t, x_0) (arXiv:2006.11239, eq. 7). At t = 0 there is no step: t' = 0, k = 0.
        previous = (timesteps - 1).clamp_min(0)
        alpha_bar_previous = alpha_bar[previous]
        alpha = alpha_bar / alpha_bar_previous
        clean_weight = alpha_bar_previous.sqrt() * (1 - alpha) / (1 - alpha_bar)
        k = clean_weight * b
        if target_timestep == "current":
            return cls(ones, zeros, zeros, k, timesteps)
        x_weight = alpha.sqrt() * (1 - alpha_bar_previous) / (1 - alpha_bar) + clean_weight * a
        sigma = ((1 - alpha_bar_previous) / (1 - alpha_bar) * (1 - alpha)).sqrt()
        return cls(x_weight, k, sigma, k, previous)

    def to(self, device, dtype):
        coefficients = (column.to(dtype).to(device) for column in self[:-1])  # MPS has no float64.
        return StepTable(*coefficients, self.timesteps.to(device))

    def at(self, timesteps):
        """The rows of `timesteps`, `(N,)`: coefficients of shape `(N, 1, 1, 1)`, and t' of shape `(N,)`."""
        coefficients = torch.stack(self[:-1])[:, timesteps]
        return StepTable(*coefficients.view(4, -1, 1, 1, 1), self.timesteps[timesteps])


def _rms(x):
    return x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def _fair_signs(noise):
    # 1 where the number of negative elements is even, else -1: a fair coin for each sample of noise. It depends on all
    # elements alike, and says nothing about any of them alone, so what is smooth in the noise does not correlate with
    # it. No device, dtype or batch changes it.
    return 1.0 - 2.0 * (torch.signbit(noise).sum(dim=(1, 2, 3), keepdim=True) % 2)


def _tf32_allowed():
    # Since PyTorch 2.9, reading an older switch raises an error if a newer one was set.
    if hasattr(torch.backends, "fp32_precision"):
        return "tf32" in (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32


class Anchor(NamedTuple):
    """What is known about a batch of N samples before the policy predicts. Callers read `ref_errors` only."""

    center: torch.Tensor  # x_{t'}(center_pred), (N, C, H, W)
    center_pred: torch.Tensor  # the reference's prediction, or the target without a reference, (N, C, H, W)
    k: torch.Tensor  # (N, 1, 1, 1)
    conditioning: tuple  # what `_features` takes after the latents
    center_features: torch.Tensor | None  # f(center); `None` for central differences
    side: torch.Tensor | float  # of the center where the gradient is taken, 1 or -1, (N, 1, 1, 1); 1 if one-sided
    ref_change: torch.Tensor | float  # the derivative of f along k * (ref_pred - target); 0 without a reference
    ref_errors: torch.Tensor | None  # the reference's errors, (N,); `None` without a reference


class NoiseConditionedPerception:
    r"""
    The perceptual error of a prediction (eq. 12 and 13): the distance between the features of the latents after a
    denoising step with this prediction, and after the same step with the target,

        e = error_scale · mean‖f(x_{t'}(pred), c, t') - f(x_{t'}(target), c, t')‖²

    Args:
        unet (`UNet2DConditionModel`): a U-Net, whose encoder with all PEFT adapters off is f. No second one is held.
        noise_scheduler (`DDPMScheduler`): its `alphas_cumprod` and `prediction_type` define the step.
        layer (`str`): f is the output of the "mid" block or of the "down" blocks.
        target_timestep (`str`): "previous" takes the posterior's step to t' = t - 1 (the paper). "current" takes a
            step of the same k_t from x_t itself, with t' = t. "zero" compares predicted clean latents, with t' = 0.
        probe_rms (`float`, *optional*): root mean square in latent space to which smaller steps are enlarged; 0 is the
            formula as printed. By default 0 in fp64, 5e-4 in fp32 (few steps are smaller), 0.03 in fp16 and TF32, 0.06
            in bf16. Half precision takes central differences: one more forward pass each, and no second-order error.
            Their gradient is that of one side, so the policy's steps are enlarged to half of this size.
        error_scale (`float`): ρ, a factor of all errors; 1 is the paper as written.

    Raises:
        `ValueError`: an unknown or negative argument, an unknown prediction type, or epsilon with zero terminal SNR.
    """

    def __init__(
        self, unet, noise_scheduler, layer="mid", target_timestep="previous", probe_rms=None, error_scale=1.0
    ):
        if layer not in LAYERS:
            raise ValueError(f"`layer` is {layer!r}, but must be one of {', '.join(LAYERS)}.")
        if probe_rms is not None and probe_rms < 0:
            raise ValueError(f"`probe_rms` is {probe_rms}, but must be at least 0.")
        self.unet = unet
        self.layer = layer
        self.probe_rms = probe_rms
        self.error_scale = error_scale
        # Copied once: a copy in every step would wait for the device.
        self.step_table = StepTable.from_scheduler(noise_scheduler, target_timestep).to(unet.device, self._error_dtype)

    def anchor(self, denoising, ref_pred=None):
        """
        The `Anchor` of a batch: everything that does not depend on the policy, without gradient. With `ref_pred`, the
        reference's prediction, `(N, C, H, W)`, its `ref_errors`, `(N,)`, are the reference's errors, and the policy's
        are these plus the policy's change, which separate rounding would hide early in training.
        """
        dtype = self._error_dtype
        target, variance_noise = denoising.target.to(dtype), denoising.variance_noise
        center_pred = target if ref_pred is None else ref_pred.detach().to(dtype)
        step = self.step_table.at(denoising.timesteps)
        center = step.x_weight * denoising.noisy_latents.to(dtype) + step.pred_weight * center_pred
        if variance_noise is not None:
            center = center + step.sigma * variance_noise.to(dtype)
        conditioning = (step.timesteps, denoising.encoder_hidden_states, denoising.added_cond_kwargs)

        center_features, side, ref_change, ref_errors = None, 1.0, 0.0, None
        if self._central:
            side = _fair_signs(denoising.noisy_latents if variance_noise is None else variance_noise)
        with torch.no_grad(), self._frozen_encoder():
            if ref_pred is not None:
                # The probe goes from the reference's prediction to the target, and the change goes the other way.
                probe, inverse_size = self._probe(step.k * (target - center_pred), self._probe_rms)
                other_points = center - probe if self._central else center
                features = self._features(torch.cat([center + probe, other_points]), *conditioning)
                features, other_features = features.to(dtype).chunk(2)
                ref_change = (other_features - features) * inverse_size
                ref_errors = self.error_scale * ref_change.square().mean(dim=(1, 2, 3))
                center_features = None if self._central else other_features
            elif not self._central:
                center_features = self._features(center, *conditioning).to(dtype)
        return Anchor(center, center_pred, step.k, conditioning, center_features, side, ref_change, ref_errors)

    def errors(self, denoising, model_pred, ref_pred=None):
        """The `Errors` of predictions of shape `(N, C, H, W)`."""
        anchor = self.anchor(denoising, ref_pred)
        return Errors(self.error(model_pred, anchor), anchor.ref_errors)

    def error(self, model_pred, anchor):
        """
        Perceptual errors of the policy's predictions `model_pred`, `(N, C, H, W)`: `(N,)`, in at least float32, once
        differentiable. Where `model_pred` is the reference's prediction, they are `anchor.ref_errors` exactly.
        """
        if torch.is_grad_enabled() and model_pred.requires_grad:
            return _ErrorFunction.apply(model_pred, self, anchor)
        return self._error_and_gradient(model_pred, anchor, needs_gradient=False)[0]

    def _error_and_gradient(self, model_pred, anchor, needs_gradient):
        # With the encoder's Jacobian J, n features, a = J·k(ref_pred - target) and Δ = J·k(pred - ref_pred):
        # e = mean (a + Δ)² = r + mean Δ(2a + Δ), and ∂e/∂pred = 2k/n · Jᵀ(a + Δ). Without a reference, a = 0, r = 0
        # and Δ = J·k(pred - target).
        dtype = self._error_dtype
        delta = anchor.k * (model_pred.detach().to(dtype) - anchor.center_pred)
        # The encoder's curvature changes the gradient at one side, the less the closer it is to the center.
        probe, inverse_size = self._probe(delta, self._probe_rms / 2 if self._central else self._probe_rms)
        probe, inverse_size = anchor.side * probe, anchor.side * inverse_size
        points, other_features = anchor.center + probe, anchor.center_features
        # The backward pass is inside the block too: checkpointing runs the encoder again, and autocast would round.
        with self._frozen_encoder(), torch.set_grad_enabled(needs_gradient):
            if self._central:
                with torch.no_grad():
                    other_features = self._features(anchor.center - probe, *anchor.conditioning).to(dtype)
            features = self._features(points.requires_grad_(needs_gradient), *anchor.conditioning)
            change = (features.detach().to(dtype) - other_features) * inverse_size
            slope = anchor.ref_change + change
            if needs_gradient:
                # The true cotangents have the size 1/n, which can underflow in fp16. They are pulled back with a root
                # mean square of 1 instead, and the result is multiplied by their size.
                slope_rms = _rms(slope)
                cotangents = (slope / slope_rms.clamp_min(torch.finfo(dtype).tiny)).to(features.dtype)
                torch.autograd.backward(features, cotangents, inputs=points)

        errors = self.error_scale * (change * (anchor.ref_change + slope)).mean(dim=(1, 2, 3))
        if anchor.ref_errors is not None:
            errors = anchor.ref_errors + errors
        if not needs_gradient:
            return errors, None
        return errors, self.error_scale * 2 / slope[0].numel() * anchor.k * slope_rms * points.grad

    def _probe(self, delta, probe_rms):
        # s·delta, whose root mean square is at least `probe_rms`, and the factor that turns a difference of features
        # into the change along delta: 1/s, or 1/(2·s) between both sides. Where delta is 0, the factor is set to 0, so
        # that the change is exactly 0 whatever the encoder rounds.
        rms = _rms(delta)
        scale = (probe_rms / rms.clamp_min(torch.finfo(rms.dtype).tiny)).clamp_min(1)
        return scale * delta, (rms > 0) / (2 * scale if self._central else scale)

    def _features(self, x, timesteps, encoder_hidden_states, added_cond_kwargs):
        # `UNet2DConditionModel.forward` up to `layer`, in the dtype of the weights. x holds one or more copies of the
        # batch, and the conditioning is repeated for each.
        unet = self.unet
        repeats = x.shape[0] // timesteps.shape[0]
        timesteps = timesteps.repeat(repeats)
        x = x.to(unet.conv_in.weight.dtype)
        encoder_hidden_states = encoder_hidden_states.to(x.dtype).repeat(repeats, 1, 1)
        if added_cond_kwargs is not None:
            added_cond_kwargs = {name: value.repeat(repeats, 1) for name, value in added_cond_kwargs.items()}

        embedding = unet.time_embedding(unet.get_time_embed(sample=x, timestep=timesteps))
        added_embedding = unet.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs)
        if added_embedding is not None:
            embedding = embedding + added_embedding
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        encoder_hidden_states = unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)

        x = unet.conv_in(x)
        blocks = [*unet.down_blocks, unet.mid_block] if self.layer == "mid" else unet.down_blocks
        for block in blocks:
            has_text = getattr(block, "has_cross_attention", False)
            output = block(x, embedding, **({"encoder_hidden_states": encoder_hidden_states} if has_text else {}))
            # Down blocks return their skip connections as well.
            x = output[0] if isinstance(output, tuple) else output
        return x

    @contextlib.contextmanager
    def _frozen_encoder(self):
        device_type = self.unet.conv_in.weight.device.type
        # The meta device has no autocast.
        available = torch.amp.is_autocast_available(device_type)
        no_autocast = torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()
        with adapters_disabled(self.unet), no_autocast:
            yield

    @property
    def _error_dtype(self):
        return torch.promote_types(self.unet.conv_in.weight.dtype, torch.float32)

    @property
    def _precision(self):
        # TF32 has the mantissa of float16.
        weight = self.unet.conv_in.weight
        return torch.float16 if weight.dtype == torch.float32 and weight.is_cuda and _tf32_allowed() else weight.dtype

    @property
    def _probe_rms(self):
        return DEFAULT_PROBE_RMS.get(self._precision, 0.0) if self.probe_rms is None else self.probe_rms

    @property
    def _central(self):
        return self._precision in (torch.float16, torch.bfloat16) and self._probe_rms > 0


class _ErrorFunction(torch.autograd.Function):
    # The encoder's forward and backward run during the policy's forward. So adapters are off in both, the encoder's
    # activations are freed before the policy's backward, and only the gradient, of the latents' size, is kept.

    @staticmethod
    def forward(ctx, model_pred, perception, anchor):
        errors, gradient = perception._error_and_gradient(model_pred, anchor, needs_gradient=True)
        ctx.save_for_backward(gradient)
        return errors

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_errors):
        (gradient,) = ctx.saved_tensors
        return grad_errors.view(-1, 1, 1, 1) * gradient, None, None
