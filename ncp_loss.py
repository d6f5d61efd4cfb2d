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

A prediction enters the perceptual error only through the latents of the next timestep, and there linearly:

    x_{t'}(pred) = x_{t'}(center_pred) + k_t * (pred - center_pred)

so that the error of a prediction is a finite difference of the encoder f along k_t * (pred - center_pred). In fp64 it is
taken literally (eq. 13). k_t is 0.001 to 0.03, though, less than half precision can see, so there the step is enlarged
by a detached factor s, and the feature difference divided by s: to first order the same number.
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
TIMESTEP_WEIGHTINGS = ("none", "balanced", "ncp")
DEFAULT_PROBE_RMS = {torch.float32: 5e-4, torch.float16: 0.05, torch.bfloat16: 0.1}


def latent_error(model_pred, target):
    """
    Mean squared error of a prediction per sample, `(N,)`, in at least float32: the latent-space counterpart of
    [`NoiseConditionedPerception.error`]. `model_pred` and `target`, both `(N, C, H, W)`, are what the scheduler's prediction
    type says.
    """
    dtype = torch.promote_types(model_pred.dtype, torch.float32)
    return (model_pred.to(dtype) - target.to(dtype)).square().mean(dim=(1, 2, 3))


# Losses


class Pairs(NamedTuple):
    """What a loss is made of: tensors of shape `(B,)`, and its options."""

    errors_w: torch.Tensor  # e_w
    errors_l: torch.Tensor  # e_l
    margin: torch.Tensor  # m = (r_w - r_l) - (e_w - e_l), r = 0 in losses without a reference
    logits: torch.Tensor  # z = ½·β·m
    beta: float  # β
    label_smoothing: float  # ε
    target_margin: float  # γ


class LossType(NamedTuple):
    losses: Callable  # of `Pairs`, a loss for each
    needs_reference: bool
    beta: float  # what to try first
    sft_weight: float | None  # λ by default; `None`: it has none
    has_label_smoothing: bool
    uses_logits: bool  # whether β enters by z alone


LOSSES = {}


def _loss_type(needs_reference=True, beta=5000.0, sft_weight=0.0, has_label_smoothing=False, uses_logits=True):
    # Enters a function `_name` into `LOSSES` as "name".
    def enter(losses):
        kind = LossType(losses, needs_reference, beta, sft_weight, has_label_smoothing, uses_logits)
        LOSSES[losses.__name__[1:]] = kind
        return losses

    return enter


@_loss_type(has_label_smoothing=True)
def _dpo(pairs):
    """-(1-ε)·log σ(z) - ε·log σ(-z) (eq. 18; arXiv:2311.12908; ε: arXiv:2305.18290)"""
    smoothing = pairs.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(pairs.logits) - smoothing * F.logsigmoid(-pairs.logits)


@_loss_type()
def _ipo(pairs):
    """(z - ½)² (arXiv:2310.12036)"""
    return (pairs.logits - 0.5).square()


@_loss_type()
def _hinge(pairs):
    """max(0, 1 - z) (arXiv:2305.10425)"""
    return F.relu(1 - pairs.logits)


@_loss_type(needs_reference=False, sft_weight=1.0, has_label_smoothing=True)
def _cpo(pairs):
    """As "dpo", without a reference and with λ = 1 (eq. 19; arXiv:2401.08417)."""
    return _dpo(pairs)


@_loss_type(needs_reference=False, sft_weight=None)
def _sft(pairs):
    """e_w"""
    return pairs.errors_w


@_loss_type(needs_reference=False)
def _simpo(pairs):
    """-log σ(z - γ) (arXiv:2405.14734)"""
    return -F.logsigmoid(pairs.logits - pairs.target_margin)


@_loss_type(needs_reference=False, beta=0.1, uses_logits=False)
def _mapo(pairs):
    """e_w - β·log σ(T·(h(e_w) - h(e_l))), h(e) = s·e / (exp(s·e) - 1), s = ½, T = 1000 (arXiv:2406.06424)"""

    def h(errors):
        x = 0.5 * errors
        # Near 0, where e is at the first timestep, by the series; exp must not overflow either.
        large = x.clamp(0.01, 80)
        return torch.where(x < 0.01, 1 - x / 2 + x.square() / 12, large / torch.expm1(large))

    return pairs.errors_w - pairs.beta * F.logsigmoid(1000 * (h(pairs.errors_w) - h(pairs.errors_l)))


@_loss_type()
def _dmpo(pairs):
    """KL(σ(z) ‖ 1-α) = σ(z)·log(σ(z)/(1-α)) + σ(-z)·log(σ(-z)/α), α = 0.01 (arXiv:2507.07510)"""
    wins, loses = F.logsigmoid(pairs.logits), F.logsigmoid(-pairs.logits)
    return wins.exp() * (wins - math.log(0.99)) + loses.exp() * (loses - math.log(0.01))


@_loss_type(beta=100.0, uses_logits=False)
def _linear(pairs):
    """u·(e_w - e_l), u = clip(½ - 0.2·β·m, η, 1-η) held constant, η = 0.001 (arXiv:2605.21123, its moving reference left out)"""
    slope = (0.5 - 0.2 * pairs.beta * pairs.margin.detach()).clamp(0.001, 0.999)
    return slope * (pairs.errors_w - pairs.errors_l)


class PreferenceLoss(NamedTuple):
    loss: torch.Tensor
    margin: torch.Tensor
    implicit_accuracy: torch.Tensor


def preference_loss(
    errors,
    ref_errors=None,
    loss_type="dpo",
    beta=None,
    sft_weight=None,
    label_smoothing=0.0,
    target_margin=1.0,
    winner_probability=None,
    error_gradients=None,
):
    r"""
    Preference loss of pairs from the errors of their samples, whichever space these were measured in: a loss of `LOSSES`,
    each of which says its formula, plus λ·e_w.

    Args:
        errors (`torch.Tensor` of shape `(2B,)`): the policy's errors, B winners first, then their B losers.
        ref_errors (`torch.Tensor` of shape `(2B,)`, *optional*): the reference's in the same order, for losses with one.
        loss_type (`str`): a key of `LOSSES`.
        beta (`float`, *optional*): β, by default that of the loss in `LOSSES`. In most losses how far the policy may leave
            the reference: the smaller, the farther.
        sft_weight (`float`, *optional*): λ, by default 1 for "cpo" and 0 for others; "sft" has none.
        label_smoothing (`float`): ε in [0, 0.5), the share of labels taken to be wrong ("dpo" and "cpo").
        target_margin (`float`): γ, what z is to exceed ("simpo").
        winner_probability (`torch.Tensor` of shape `(B,)`, *optional*): how sure it is that winners won, in [0, 1]. With
            p the loss is p times its own plus 1 - p times that with winner and loser exchanged.
        error_gradients (`torch.Tensor` of shape `(2B, C, H, W)`, *optional*): g = ∂e/∂pred. With them the gradient of e_l is
            multiplied by min(1, (1-μ)·‖g_w‖²/⟨g_w, g_l⟩) where ⟨g_w, g_l⟩ > 0, μ = 0.9: a step against the gradient with
            respect to the predictions cannot raise e_w to first order (arXiv:2511.03317).

    Returns:
        `PreferenceLoss`: `loss` (a scalar, the mean over pairs), `margin` m of shape `(B,)`, and `implicit_accuracy`, the
        share of pairs with m > 0, ties counting half (a scalar). A `ValueError` says what does not go together.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"`loss_type` is {loss_type!r}, but must be one of {', '.join(LOSSES)}.")
    kind = LOSSES[loss_type]
    if errors.shape[0] % 2:
        raise ValueError(f"`errors` must hold as many winners as losers, but its length is {errors.shape[0]}.")
    if not kind.needs_reference:
        ref_errors = torch.zeros_like(errors)
    elif ref_errors is None:
        raise ValueError(f"loss type {loss_type!r} needs `ref_errors`, the errors of the reference model.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` is {label_smoothing}, but must be in [0, 0.5).")
    if label_smoothing and not kind.has_label_smoothing:
        raise ValueError(f"loss type {loss_type!r} has no `label_smoothing`; 'dpo' and 'cpo' have.")
    if sft_weight is not None and kind.sft_weight is None:
        raise ValueError(f"loss type {loss_type!r} has no `sft_weight`: it is the winner's error alone.")
    beta = kind.beta if beta is None else beta
    sft_weight = kind.sft_weight or 0.0 if sft_weight is None else sft_weight

    def losses_and_margin(errors, ref_errors, error_gradients):
        errors_w, errors_l = errors.chunk(2)
        ref_errors_w, ref_errors_l = ref_errors.chunk(2)
        if error_gradients is not None:
            constant = errors_l.detach()
            errors_l = constant + _safeguard(error_gradients).to(constant) * (errors_l - constant)
        margin = (ref_errors_w - ref_errors_l) - (errors_w - errors_l)
        pairs = Pairs(errors_w, errors_l, margin, 0.5 * beta * margin, beta, label_smoothing, target_margin)
        return kind.losses(pairs) + sft_weight * errors_w, margin

    losses, margin = losses_and_margin(errors, ref_errors, error_gradients)
    if winner_probability is not None:
        half = errors.shape[0] // 2
        exchanged = (None if x is None else x.roll(half, 0) for x in (errors, ref_errors, error_gradients))
        losses = winner_probability * losses + (1 - winner_probability) * losses_and_margin(*exchanged)[0]
    return PreferenceLoss(losses.mean(), margin, (0.5 * (margin.sign() + 1)).mean())


def _safeguard(error_gradients, mu=0.9):
    gradients = error_gradients.flatten(1)
    g_w, g_l = gradients.to(torch.promote_types(gradients.dtype, torch.float32)).chunk(2)
    inner, limit = (g_w * g_l).sum(dim=1), (1 - mu) * g_w.square().sum(dim=1)
    return torch.where(inner > limit, limit / inner, 1.0)


# The unit of errors, and timesteps


def spread_timesteps(timesteps, first, count, offset):
    """
    Timesteps number `first` to `first + count - 1` of a sequence that covers `timesteps`, of shape `(T,)`, evenly wherever
    it is cut off: multiples of the golden ratio modulo 1, from `offset` in [0, 1) on.
    """
    positions = (offset + (math.sqrt(5) - 1) / 2 * torch.arange(first, first + count, dtype=torch.float64)) % 1
    return timesteps[(positions * len(timesteps)).long()]


def error_scale(latent_margins, feature_margins):
    """
    The unit ρ that gives errors in feature space the size of those in latent space, so that β, λ and learning rates keep
    their meaning: log ρ = mean(log|m_latent| - log|m_feature|). Margins, unlike errors, are what losses see; their tails are
    heavy, so that of a few hundred pairs the geometric mean is steady, and standard deviations are not.

    Args:
        latent_margins (`torch.Tensor` of shape `(B,)`): (r_w - r_l) - (e_w - e_l) in latent space, under a small random
            change of the policy, at timesteps from [`spread_timesteps`].
        feature_margins (`torch.Tensor` of shape `(B,)`): the same in feature space, with an `error_scale` of 1.

    Returns:
        `tuple[float, float]`: ρ, and the standard error of log ρ. Margins of 0, as at the first timestep, do not count; a
        `ValueError` if fewer than two are left.
    """
    ratios = latent_margins.double().abs().log() - feature_margins.double().abs().log()
    ratios = ratios[ratios.isfinite()]
    if len(ratios) < 2:
        raise ValueError(f"{len(ratios)} pairs have margins other than 0 in both spaces, but two or more must have.")
    return ratios.mean().exp().item(), ratios.std().item() / math.sqrt(len(ratios))


def margin_profile(timesteps, margins, all_timesteps, num_bins=8):
    """
    The size of margins by timestep: the mean of log|m|, of shape `(num_bins,)`, in equal bins of `all_timesteps`, of shape
    `(T,)` and ascending; fewer bins if T is less. `timesteps` and `margins`, both `(B,)`, are those of one space.
    """
    num_bins, logs = min(num_bins, len(all_timesteps)), margins.double().abs().log()
    bins = torch.searchsorted(all_timesteps, timesteps) * num_bins // len(all_timesteps)
    return torch.stack([logs[logs.isfinite() & (bins == index)].mean() for index in range(num_bins)])


def smooth_curve(values, length):
    """`length` points of the cosine series that takes `values`, of shape `(K,)`, at the centres of K equal bins."""

    def cosines(count):
        positions = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return torch.cos(math.pi * positions[:, None] * torch.arange(len(values)))

    return cosines(length) @ torch.linalg.solve(cosines(len(values)), values)


def timestep_weights(weighting, latent_profile, feature_profile, loss_space, length):
    """
    Weights of errors by timestep, of shape `(length,)`, smooth, positive, and 1 in the mean, from both spaces'
    [`margin_profile`]: "balanced" is 1 over the size of margins in `loss_space` ("latent" or "ncp"), so that they spread
    alike at all timesteps; "ncp" gives latent errors the profile of perceptual ones; "none" is 1.
    """
    balanced = -(latent_profile if loss_space == "latent" else feature_profile)
    profiles = {"none": 0 * balanced, "balanced": balanced, "ncp": feature_profile - latent_profile}
    weights = smooth_curve(profiles[weighting], length).exp()
    return weights / weights.mean()


@contextlib.contextmanager
def adapters_disabled(unet):
    """
    Makes a U-Net with LoRA adapters its own reference model within the `with` block; a U-Net without is left alone. Blocks
    may be nested; what requires a gradient is left as it is. `unet` is the model itself, not a distributed wrapper.
    """
    layers = [layer for layer in _adapter_layers(unet) if not layer.disable_adapters]
    # Of PEFT's switch only this: the rest of it takes every step of SDXL 0.2 s to visit all parameters.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _adapter_layers(unet):
    modules = [unet]
    while modules:
        module = modules.pop()
        # A class attribute of PEFT's layers; what is below them is theirs.
        if hasattr(type(module), "_disable_adapters"):
            yield module
        else:
            modules.extend(module.children())


class StepTable(NamedTuple):
    """
    The step x_{t'}(pred) = x_weight·x_t + pred_weight·pred + sigma·z, eq. 12, its derivative k with respect to the
    prediction, and t', for every t. All of shape `(T,)`, float64 but for the timesteps.
    """

    x_weight: torch.Tensor
    pred_weight: torch.Tensor
    sigma: torch.Tensor
    k: torch.Tensor
    timesteps: torch.Tensor

    @classmethod
    def from_scheduler(cls, noise_scheduler, target_timestep):
        if target_timestep not in TARGET_TIMESTEPS:
            known = ", ".join(TARGET_TIMESTEPS)
            raise ValueError(f"`target_timestep` is {target_timestep!r}, but must be one of {known}.")
        alpha_bar = noise_scheduler.alphas_cumprod.double().cpu()
        timesteps = torch.arange(alpha_bar.shape[0])
        zeros, ones = torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)

        # The predicted clean latents, a·x_t + b·pred
        prediction_type = noise_scheduler.config.prediction_type
        if prediction_type == "epsilon":
            if alpha_bar[-1] == 0:
                what = "An epsilon prediction says nothing of the clean latents at zero terminal SNR: the scheduler's"
                raise ValueError(f"{what} `prediction_type` must be another, or its `rescale_betas_zero_snr` False.")
            a, b = alpha_bar.rsqrt(), -((1 - alpha_bar) / alpha_bar).sqrt()
        elif prediction_type == "v_prediction":
            a, b = alpha_bar.sqrt(), -(1 - alpha_bar).sqrt()
        elif prediction_type == "sample":
            a, b = zeros, ones
        else:
            known = "'epsilon', 'v_prediction' or 'sample'"
            raise ValueError(f"The scheduler's `prediction_type` is {prediction_type!r}, but must be {known}.")
        if target_timestep == "zero":
            return cls(a, b, zeros, b, torch.zeros_like(timesteps))

        # DDPM's posterior q(x_{t'} | x_t, x_0) (arXiv:2006.11239, eq. 7). At t = 0 it stays where it is.
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

    def at(self, timesteps, dtype):
        """The row of every timestep: coefficients of shape `(N, 1, 1, 1)` in `dtype`, and t' of shape `(N,)`."""
        coefficients = torch.stack(self[:-1]).to(dtype).to(timesteps.device)[:, timesteps]
        return StepTable(*coefficients.view(4, -1, 1, 1, 1), self.timesteps.to(timesteps.device)[timesteps])


def _rms(x):
    return x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def _tf32_allowed():
    # Since PyTorch 2.9 the older switches cannot be read once a newer one was set.
    if hasattr(torch.backends, "fp32_precision"):
        return "tf32" in (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32


class Anchor(NamedTuple):
    """
    What is known of a batch of N samples before the policy's prediction is. `ref_errors` is for the caller, the rest between
    [`NoiseConditionedPerception.anchor`] and [`NoiseConditionedPerception.error`].
    """

    center: torch.Tensor  # x_{t'}(center_pred), (N, C, H, W)
    center_pred: torch.Tensor  # the reference's prediction if there is one, else the target, (N, C, H, W)
    k: torch.Tensor  # (N, 1, 1, 1)
    conditioning: tuple  # what f takes beside latents: t', encoder_hidden_states, added_cond_kwargs
    center_features: torch.Tensor | None  # f(center), for one-sided differences
    ref_change: torch.Tensor | float  # the derivative of f along k * (ref_pred - target)
    ref_errors: torch.Tensor | None  # (N,)


class NoiseConditionedPerception:
    r"""
    The perceptual error of a prediction, eq. 12 and 13: how far apart the frozen U-Net's encoder f sees the latents that a
    denoising step leads to with this prediction, and with the target,

        e = error_scale · mean‖f(x_{t'}(pred), c, t') - f(x_{t'}(target), c, t')‖²

    f is the U-Net's own encoder with its adapters off, so that no second U-Net is held.

    Args:
        unet (`UNet2DConditionModel`): a U-Net with PEFT adapters, or a plain frozen one.
        noise_scheduler (`DDPMScheduler`): its `alphas_cumprod` and `prediction_type` ("epsilon", "v_prediction" or
            "sample") define the step.
        layer (`str`): f is the output of the "mid" block or of the "down" blocks.
        target_timestep (`str`): "previous" is t' = t - 1, the posterior's step (the paper). "current" takes a step of the
            same k_t from x_t itself, seen at t' = t. "zero" compares the predicted clean latents, seen at t' = 0.
        probe_rms (`float`, *optional*): root mean square in latent space to which smaller steps are enlarged; 0 is the
            literal formula. By default 0 in fp64, 5e-4 in fp32 (few steps are smaller), 0.05 in fp16 and TF32, 0.1 in
            bf16. Half precision takes central differences: one more pass each, no second-order error.
        error_scale (`float`): ρ, the unit of the error; 1 is the paper as written.

    Raises:
        `ValueError`: unknown `layer` or `target_timestep`, negative `probe_rms`, or a scheduler for which the error is
        infinite (epsilon prediction with zero terminal SNR) or unknown (another prediction type).
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
        self.target_timestep = target_timestep
        self.probe_rms = probe_rms
        self.error_scale = error_scale
        self.step_table = StepTable.from_scheduler(noise_scheduler, target_timestep)

    def anchor(
        self,
        noisy_latents,
        timesteps,
        target,
        encoder_hidden_states,
        added_cond_kwargs=None,
        variance_noise=None,
        ref_pred=None,
    ):
        """
        Everything about a batch that does not depend on the policy, without gradient.

        Args:
            noisy_latents (`torch.Tensor` of shape `(N, C, H, W)`): x_t.
            timesteps (`torch.LongTensor` of shape `(N,)`): t.
            target (`torch.Tensor` of shape `(N, C, H, W)`): the true noise, velocity or sample.
            encoder_hidden_states (`torch.Tensor` of shape `(N, L, D)`): the text embeddings.
            added_cond_kwargs (`dict`, *optional*): SDXL's `text_embeds` `(N, P)` and `time_ids` `(N, 6)`.
            variance_noise (`torch.Tensor` of shape `(N, C, H, W)`, *optional*): z of eq. 12, by default 0.
            ref_pred (`torch.Tensor` of shape `(N, C, H, W)`, *optional*): the reference's prediction. With it, errors are
                the reference's plus the policy's change, which two separately rounded errors would drown early in training.

        Returns:
            `Anchor`: for [`~NoiseConditionedPerception.error`]; its `ref_errors` `(N,)` are the reference's.
        """
        dtype = self._error_dtype
        target = target.to(dtype)
        center_pred = target if ref_pred is None else ref_pred.detach().to(dtype)
        step = self.step_table.at(timesteps, dtype)
        center = step.x_weight * noisy_latents.to(dtype) + step.pred_weight * center_pred
        if variance_noise is not None:
            center = center + step.sigma * variance_noise.to(dtype)
        conditioning = (step.timesteps, encoder_hidden_states, added_cond_kwargs)

        points = [] if self._central else [center]
        if ref_pred is not None:
            ref_points, inverse_scale = self._probe(center, step.k * (target - center_pred))
            points.append(ref_points)

        center_features, ref_change, ref_errors = None, 0.0, None
        if points:
            with torch.no_grad(), self._frozen_encoder():
                features = self._features(torch.cat(points), *conditioning)
            if not self._central:
                center_features, features = features.tensor_split([center.shape[0]])
            if ref_pred is not None:
                # The probe went from the reference to the target; the change is the other way.
                ref_change = -self._change(features, center_features, inverse_scale)
                ref_errors = self.error_scale * ref_change.square().mean(dim=(1, 2, 3))
        return Anchor(center, center_pred, step.k, conditioning, center_features, ref_change, ref_errors)

    def error(self, model_pred, anchor):
        """
        Perceptual error of the policy's prediction `model_pred`, `(N, C, H, W)`, per sample, eq. 13 times `error_scale`.

        Returns:
            `torch.Tensor` of shape `(N,)`: the errors in at least float32, once differentiable with respect to
            `model_pred`. Where this equals the reference's prediction, they equal `anchor.ref_errors` exactly.
        """
        if torch.is_grad_enabled() and model_pred.requires_grad:
            return _ErrorFunction.apply(model_pred, self, anchor)
        return self._error_and_gradient(model_pred, anchor, needs_gradient=False)[0]

    def _error_and_gradient(self, model_pred, anchor, needs_gradient):
        # With J the encoder's Jacobian and n features, a = J·k(ref_pred - target) and Δ = J·k(pred - ref_pred):
        # e = mean (a + Δ)² = r + mean Δ(2a + Δ), and ∂e/∂pred = 2k/n · Jᵀ(a + Δ). Without a reference a = 0, r = 0 and
        # Δ = J·k(pred - target).
        dtype = self._error_dtype
        delta = anchor.k * (model_pred.detach().to(dtype) - anchor.center_pred)
        points, inverse_scale = self._probe(anchor.center, delta)
        # The backward pass belongs in here: gradient checkpointing runs the encoder again, and autocast would round.
        with torch.set_grad_enabled(needs_gradient), self._frozen_encoder():
            features = self._features(points.requires_grad_(needs_gradient), *anchor.conditioning)
            change = self._change(features.detach(), anchor.center_features, inverse_scale)
            slope = anchor.ref_change + change
            if needs_gradient:
                # Pulled back with an rms of 1, cotangents stay clear of both ends of fp16's range; their true size, about
                # 1/n, comes in afterwards.
                slope_rms = _rms(slope)
                cotangents = (slope / slope_rms.clamp_min(torch.finfo(dtype).tiny)).to(features.dtype)
                sides = points.shape[0] // delta.shape[0]
                torch.autograd.backward(features, cotangents.repeat(sides, 1, 1, 1), inputs=points)

        errors = self.error_scale * (change * (anchor.ref_change + slope)).mean(dim=(1, 2, 3))
        if anchor.ref_errors is not None:
            errors = anchor.ref_errors + errors
        if not needs_gradient:
            return errors, None
        pulled_back = points.grad.unflatten(0, (sides, -1)).mean(dim=0)
        return errors, self.error_scale * 2 / slope[0].numel() * anchor.k * slope_rms * pulled_back

    def _probe(self, center, delta):
        # The point s·delta away from the center (and the one opposite), and 1/s per sample. 0 for 1/s where delta is 0
        # makes the change exactly 0 there, whatever the encoder's rounding does.
        rms = _rms(delta)
        scale = (self._probe_rms / rms.clamp_min(torch.finfo(rms.dtype).tiny)).clamp_min(1)
        points = center + scale * delta
        if self._central:
            points = torch.cat([points, center - scale * delta])
        return points, (rms > 0) / scale

    def _change(self, features, center_features, inverse_scale):
        # The derivative of f along delta from its values at the points of `_probe`.
        features = features.to(self._error_dtype)
        if self._central:
            plus, minus = features.chunk(2)
            return (plus - minus) * (0.5 * inverse_scale)
        return (features - center_features.to(self._error_dtype)) * inverse_scale

    def _features(self, x, timesteps, encoder_hidden_states, added_cond_kwargs=None):
        # `UNet2DConditionModel.forward` up to the wanted layer, in the dtype of the weights. For x a multiple of the
        # batch the conditioning is repeated.
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
            attended = getattr(block, "has_cross_attention", False)
            output = block(x, embedding, **({"encoder_hidden_states": encoder_hidden_states} if attended else {}))
            # Down blocks return their skip connections as well.
            x = output[0] if isinstance(output, tuple) else output
        return x

    @contextlib.contextmanager
    def _frozen_encoder(self):
        device_type = self.unet.conv_in.weight.device.type
        # There is no autocast for the meta device.
        available = torch.amp.is_autocast_available(device_type)
        no_autocast = torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()
        with adapters_disabled(self.unet), no_autocast:
            yield

    @property
    def _error_dtype(self):
        return torch.promote_types(self.unet.conv_in.weight.dtype, torch.float32)

    @property
    def _precision(self):
        # TF32 has float16's mantissa.
        weight = self.unet.conv_in.weight
        return torch.float16 if weight.dtype == torch.float32 and weight.is_cuda and _tf32_allowed() else weight.dtype

    @property
    def _probe_rms(self):
        return DEFAULT_PROBE_RMS.get(self._precision, 0.0) if self.probe_rms is None else self.probe_rms

    @property
    def _central(self):
        return self._precision in (torch.float16, torch.bfloat16) and self._probe_rms > 0


class _ErrorFunction(torch.autograd.Function):
    # The encoder's forward and backward run at once, within the policy's forward: adapters are off for both, activations
    # are freed before the policy's backward, and only the gradient, of latent size, is kept.

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
