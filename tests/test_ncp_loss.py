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

"""Tests `ncp_loss.py` against a second implementation of the paper's equations, in float64 with plain autograd."""

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from ncp_loss import (
    LOSSES,
    Denoising,
    LatentSpace,
    NoiseConditionedPerception,
    adapters_disabled,
    error_scale,
    latent_error,
    perturbed_policy,
    preference_loss,
    preference_metrics,
    reference_model,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_unets import CONVOLUTIONS, LORA_TARGETS, UNETS, add_lora, conditioning, lora_parameters, sd15_unet, sdxl_unet

from diffusers import DDPMScheduler


PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
# Two winners, then two losers. Here the samples of a pair have different timesteps, so that a mix-up of samples shows.
TIMESTEPS = (0, 1, 430, 999)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def ddpm(prediction_type="epsilon", **kwargs):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, **kwargs
    )


class Literal:
    """Eq. 12 and 13 as printed, on a frozen copy of `unet`. A forward hook takes the features from a full forward pass."""

    def __init__(self, unet, scheduler, layer="mid", target_timestep="previous"):
        self.unet = copy.deepcopy(unet).double().requires_grad_(False)
        self.unet.disable_gradient_checkpointing()
        self.module = self.unet.mid_block if layer == "mid" else self.unet.down_blocks[-1]
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        self.prediction_type = scheduler.config.prediction_type
        self.target_timestep = target_timestep

    def features(self, x, timesteps, encoder_hidden_states, added_cond_kwargs):
        captured = []
        # A down block returns (hidden states, residuals of the skip connections).
        handle = self.module.register_forward_hook(
            lambda module, inputs, output: captured.append(output[0] if isinstance(output, tuple) else output)
        )
        self.unet(x, timesteps, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs)
        handle.remove()
        return captured[0]

    def x0_and_noise(self, prediction, x_t, abar):
        if self.prediction_type == "epsilon":
            return (x_t - (1 - abar).sqrt() * prediction) / abar.sqrt(), prediction
        if self.prediction_type == "v_prediction":
            return (
                abar.sqrt() * x_t - (1 - abar).sqrt() * prediction,
                abar.sqrt() * prediction + (1 - abar).sqrt() * x_t,
            )
        return prediction, (x_t - abar.sqrt() * prediction) / (1 - abar).sqrt()

    def reverse_step(self, prediction, x_t, timesteps, z):
        """x_{t'} of eq. 12."""
        previous = (timesteps - 1).clamp(min=0)
        abar, abar_previous = (self.alphas_cumprod[t].view(-1, 1, 1, 1) for t in (timesteps, previous))
        alpha = abar / abar_previous
        sigma = ((1 - abar_previous) / (1 - abar) * (1 - alpha)).sqrt()
        noise = self.x0_and_noise(prediction, x_t, abar)[1]
        return (x_t - (1 - alpha) / (1 - abar).sqrt() * noise) / alpha.sqrt() + sigma * z

    def error(self, prediction, x_t, timesteps, target, condition, z=None, center=None):
        z = torch.zeros_like(x_t) if z is None else z
        if self.target_timestep == "previous":
            seen_at = (timesteps - 1).clamp(min=0)

            def seen(p):
                return self.reverse_step(p, x_t, timesteps, z)

        elif self.target_timestep == "zero":
            seen_at = torch.zeros_like(timesteps)
            abar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

            def seen(p):
                return self.x0_and_noise(p, x_t, abar)[0]

        else:
            # The center is x_t itself. The step is affine in the prediction, and k_t is its slope.
            seen_at = timesteps
            one, nil = torch.ones_like(x_t), torch.zeros_like(x_t)
            k = self.reverse_step(one, x_t, timesteps, nil) - self.reverse_step(nil, x_t, timesteps, nil)
            center = target if center is None else center

            def seen(p):
                return x_t + k * (p - center)

        difference = self.features(seen(prediction), seen_at, *condition) - self.features(
            seen(target), seen_at, *condition
        )
        return difference.square().mean(dim=(1, 2, 3))


def make_batch(unet, scheduler, timesteps=TIMESTEPS, dtype=torch.float64, prediction_rms=0.3, ref_rms=0.2):
    """The inputs of a training step. `prediction` and `ref` have independent errors."""
    generator = torch.Generator().manual_seed(7)
    shape = (len(timesteps), 4, 8, 8)
    x0, noise, z, off, ref_off = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5))
    timesteps = torch.tensor(timesteps)
    x_t = scheduler.add_noise(x0, noise, timesteps)
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(x0, noise, timesteps),
        "sample": lambda: x0,
    }[scheduler.config.prediction_type]()
    batch = {
        "x_t": x_t,
        "target": target,
        "z": z,
        "prediction": target + prediction_rms * off,
        "ref": target + ref_rms * ref_off,
    }
    batch = {key: value.to(dtype) for key, value in batch.items()}
    return {**batch, "timesteps": timesteps, "condition": conditioning(unet, len(timesteps))}


def anchor_of(perception, batch, z=False, ref=False):
    inputs = batch["x_t"], batch["timesteps"], batch["target"], *batch["condition"], batch["z"] if z else None
    return perception.anchor(Denoising(*inputs), batch["ref"] if ref else None)


def with_gradient(error, prediction):
    """`error(prediction)` and the gradient of its sum with unequal weights, so that a mix-up of samples shows."""
    prediction = prediction.detach().clone().requires_grad_(True)
    errors = error(prediction)
    weights = torch.linspace(1.0, 2.0, len(errors), dtype=errors.dtype)
    (errors * weights).sum().backward()
    return errors.detach(), prediction.grad


def relative_difference(actual, expected):
    """The largest relative difference of a sample. Samples that should be zero must be exactly zero."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = actual.reshape(len(actual), -1), expected.reshape(len(expected), -1)
    distance, size = (actual - expected).norm(dim=1), expected.norm(dim=1)
    assert torch.isfinite(distance).all()
    assert (distance[size == 0] == 0).all()
    return (distance / size.clamp(min=1e-300)).max().item()


def cosines(actual, expected):
    # F.cosine_similarity replaces norms below 1e-8, and some norms here are smaller.
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    return (actual * expected).sum(dim=1) / (actual.norm(dim=1) * expected.norm(dim=1))


# --- eq. 12 and 13 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("layer", ["mid", "down"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", UNETS)
def test_error_and_gradient_are_the_papers(shape, prediction_type, layer, checkpointing, lora):
    scheduler = ddpm(prediction_type)
    unet = UNETS[shape]().double().requires_grad_(False)
    literal = Literal(unet, scheduler, layer)
    if lora:
        add_lora(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    batch = make_batch(unet, scheduler)
    perception = NoiseConditionedPerception(unet, scheduler, layer=layer)

    for z in (False, True):
        arguments = (batch["x_t"], batch["timesteps"], batch["target"], batch["condition"], batch["z"] if z else None)
        expected, expected_gradient = with_gradient(lambda p: literal.error(p, *arguments), batch["prediction"])
        assert (expected[1:] > 0).all()
        for ref in (False, True):
            anchor = anchor_of(perception, batch, z, ref)
            errors, gradient = with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])
            assert relative_difference(errors, expected) < 1e-6
            assert relative_difference(gradient, expected_gradient) < 1e-6
            # At t = 0 there is no step, so the error is 0.
            assert errors[0] == 0 and not gradient[0].any()
        assert relative_difference(anchor.ref_errors, literal.error(batch["ref"], *arguments)) < 1e-6
        assert not anchor.ref_errors.requires_grad
    assert anchor_of(perception, batch).ref_errors is None


@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("target_timestep", ["current", "zero"])
@pytest.mark.parametrize("layer", ["mid", "down"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_other_target_timesteps(prediction_type, layer, target_timestep, ref):
    scheduler = ddpm(prediction_type)
    unet = sd15_unet().double()
    literal = Literal(unet, scheduler, layer, target_timestep)
    batch = make_batch(unet, scheduler)
    arguments = (batch["x_t"], batch["timesteps"], batch["target"], batch["condition"])
    center = batch["ref"] if ref else None

    perception = NoiseConditionedPerception(unet, scheduler, layer=layer, target_timestep=target_timestep)
    anchor = anchor_of(perception, batch, ref=ref)
    errors, gradient = with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])
    expected, expected_gradient = with_gradient(
        lambda p: literal.error(p, *arguments, center=center), batch["prediction"]
    )

    assert relative_difference(errors, expected) < 1e-6
    assert relative_difference(gradient, expected_gradient) < 1e-6
    if ref:
        assert relative_difference(anchor.ref_errors, literal.error(batch["ref"], *arguments, center=center)) < 1e-6
    if target_timestep == "current":
        assert errors[0] == 0 and not gradient[0].any()


@pytest.mark.parametrize("target_timestep", ["current", "zero"])
def test_other_target_timesteps_ignore_the_variance_noise(target_timestep):
    unet, scheduler = sd15_unet().double(), ddpm()
    batch = make_batch(unet, scheduler)
    perception = NoiseConditionedPerception(unet, scheduler, target_timestep=target_timestep)
    without, with_z = (
        perception.error(batch["prediction"], anchor_of(perception, batch, z=z, ref=True)) for z in (False, True)
    )
    assert torch.equal(without, with_z)


def test_error_scale_multiplies_errors_reference_errors_and_gradient():
    unet, scheduler = sd15_unet().double(), ddpm()
    batch = make_batch(unet, scheduler)
    results = []
    for error_scale in (1.0, 400.0):
        perception = NoiseConditionedPerception(unet, scheduler, error_scale=error_scale)
        anchor = anchor_of(perception, batch, ref=True)
        results.append((*with_gradient(lambda p: perception.error(p, anchor), batch["prediction"]), anchor.ref_errors))
    for small, large in zip(*results):
        assert relative_difference(large, 400.0 * small) < 1e-9


def test_an_anchor_serves_several_predictions_and_inputs_stay_untouched():
    unet, scheduler = sd15_unet().double(), ddpm()
    batch = make_batch(unet, scheduler)
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    perception = NoiseConditionedPerception(unet, scheduler)
    anchor = anchor_of(perception, batch, ref=True)
    first = with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])
    perception.error(batch["ref"], anchor)
    again = with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(batch[key], value) for key, value in before.items())


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_finite_at_the_last_timestep(prediction_type):
    scheduler = ddpm(prediction_type, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    unet = sd15_unet().double()
    batch = make_batch(unet, scheduler, (999, 998, 999, 500))
    literal = Literal(unet, scheduler)

    def posterior_mean(prediction, x_t, timesteps, z):
        # Eq. 12 is 0 / 0 here. Its form with the predicted clean latents is finite.
        abar, abar_previous = (literal.alphas_cumprod[t].view(-1, 1, 1, 1) for t in (timesteps, timesteps - 1))
        alpha = abar / abar_previous
        x0 = prediction if prediction_type == "sample" else abar.sqrt() * x_t - (1 - abar).sqrt() * prediction
        return (abar_previous.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - abar_previous) * x_t) / (1 - abar)

    literal.reverse_step = posterior_mean
    arguments = (batch["x_t"], batch["timesteps"], batch["target"], batch["condition"])
    perception = NoiseConditionedPerception(unet, scheduler)
    anchor = anchor_of(perception, batch, ref=True)
    errors, gradient = with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])
    expected, expected_gradient = with_gradient(lambda p: literal.error(p, *arguments), batch["prediction"])
    assert (expected > 0).all()
    assert relative_difference(errors, expected) < 1e-6
    assert relative_difference(gradient, expected_gradient) < 1e-6
    assert relative_difference(anchor.ref_errors, literal.error(batch["ref"], *arguments)) < 1e-6


def test_a_unet_with_an_activation_after_the_time_embedding():
    unet, scheduler = sd15_unet(time_embedding_act_fn="silu").double(), ddpm()
    batch = make_batch(unet, scheduler)
    perception = NoiseConditionedPerception(unet, scheduler)
    errors = perception.error(batch["prediction"], anchor_of(perception, batch))
    expected = Literal(unet, scheduler).error(
        batch["prediction"], batch["x_t"], batch["timesteps"], batch["target"], batch["condition"]
    )
    assert relative_difference(errors, expected) < 1e-6


# --- one U-Net for policy, reference and perception ------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dpo", "cpo"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", UNETS)
def test_lora_gradients_equal_those_of_three_separate_unets(shape, prediction_type, checkpointing, loss_type):
    scheduler = ddpm(prediction_type)
    base = UNETS[shape]().double().requires_grad_(False)
    literal = Literal(base, scheduler)
    unet = add_lora(copy.deepcopy(base))
    policy = copy.deepcopy(unet)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    batch = make_batch(unet, scheduler, (700, 30, 700, 30))
    encoder_hidden_states, added_cond_kwargs = batch["condition"]
    inputs = (batch["x_t"], batch["timesteps"], encoder_hidden_states)
    needs_reference = loss_type == "dpo"
    # Large enough that the sigmoid is not linear.
    beta = 1e6

    perception = NoiseConditionedPerception(unet, scheduler)
    if needs_reference:
        with torch.no_grad(), adapters_disabled(unet):
            batch["ref"] = unet(*inputs, added_cond_kwargs=added_cond_kwargs).sample
    model_pred = unet(*inputs, added_cond_kwargs=added_cond_kwargs).sample
    anchor = anchor_of(perception, batch, z=True, ref=needs_reference)
    errors = perception.error(model_pred, anchor)
    sft_weight = 0.0 if needs_reference else 30.0
    result = preference_loss(errors, anchor.ref_errors, loss_type=loss_type, beta=beta, sft_weight=sft_weight)
    result.loss.backward()

    def literal_error(prediction):
        arguments = (batch["x_t"], batch["timesteps"], batch["target"], batch["condition"], batch["z"])
        return literal.error(prediction, *arguments)

    e_w, e_l = literal_error(policy(*inputs, added_cond_kwargs=added_cond_kwargs).sample).chunk(2)
    if needs_reference:
        r_w, r_l = literal_error(base(*inputs, added_cond_kwargs=added_cond_kwargs).sample).chunk(2)
        logits = 0.5 * beta * ((r_w - r_l) - (e_w - e_l))
        loss = -logits.sigmoid().log().mean()
    else:
        logits = -0.5 * beta * (e_w - e_l)
        loss = (-logits.sigmoid().log() + 30.0 * e_w).mean()
    loss.backward()

    assert 0.01 < logits.abs().max() < 30
    torch.testing.assert_close(result.loss.detach(), loss.detach(), rtol=1e-6, atol=0)
    expected = lora_parameters(policy)
    # With a single token, attention does not depend on the queries, so their gradients are rounding.
    rounding = 1e-10 * max(parameter.grad.norm() for parameter in expected.values())
    for name, parameter in lora_parameters(unet).items():
        assert parameter.requires_grad and parameter.grad is not None, name
        assert expected[name].grad.norm() > 0 or "up_blocks.0.attentions" not in name
        scale = expected[name].grad.norm().clamp_min(rounding)
        assert (parameter.grad - expected[name].grad).norm() <= 1e-6 * scale, name
    assert all(parameter.grad is None for name, parameter in unet.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_perception_leaves_the_unet_as_it_was(lora):
    # The plain U-Net is not frozen here, and still its weights must get no gradient.
    unet = add_lora(sd15_unet()) if lora else sd15_unet()
    unet.train()
    batch = make_batch(unet, ddpm(), dtype=torch.float32)
    inputs = (batch["x_t"], batch["timesteps"], batch["condition"][0])
    with torch.no_grad():
        before = unet(*inputs).sample
    flags = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    perception = NoiseConditionedPerception(unet, ddpm())
    with_gradient(lambda p: perception.error(p, anchor_of(perception, batch, ref=True)), batch["prediction"])
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, before)
    assert unet.training
    assert flags == {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    assert all(parameter.grad is None for parameter in unet.parameters())


# fp16 and bf16 use probes. Their rounding must cancel exactly, as that of the literal formula does.
@pytest.mark.parametrize("target_timestep", ["previous", "current", "zero"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_policy_equal_to_reference(dtype, target_timestep):
    unet, scheduler = sd15_unet().to(dtype), ddpm()
    batch = make_batch(unet, scheduler, (700, 30, 700, 30), dtype=torch.promote_types(dtype, torch.float32))
    # These U-Nets are small, so less rounding averages out than in test_ncp_precision.py, and half precision needs a
    # larger probe than its default.
    probe_rms = 0.1 if dtype in (torch.float16, torch.bfloat16) else None
    options = {"target_timestep": target_timestep, "probe_rms": probe_rms}
    perception = NoiseConditionedPerception(unet, scheduler, **options)
    anchor = anchor_of(perception, batch, ref=True)
    errors, gradient = with_gradient(lambda p: perception.error(p, anchor), batch["ref"])
    assert torch.equal(errors, anchor.ref_errors)
    result = preference_loss(errors, anchor.ref_errors)
    assert (result.margin == 0).all()
    assert result.loss.item() == pytest.approx(math.log(2))
    assert result.implicit_accuracy.item() == 0.5

    # Training starts here: the errors are equal, but their gradient must not be zero.
    literal = Literal(unet, scheduler, target_timestep=target_timestep)
    condition = tuple(conditioning(literal.unet, 4))
    arguments = (batch["x_t"].double(), batch["timesteps"], batch["target"].double(), condition)
    expected, expected_gradient = with_gradient(
        lambda p: literal.error(p, *arguments, center=batch["ref"].double()), batch["ref"].double()
    )
    if dtype == torch.float64:
        assert relative_difference(errors, expected) < 1e-6
        assert relative_difference(gradient, expected_gradient) < 1e-6
    else:
        bound = 0.99 if dtype == torch.float32 else 0.3
        assert cosines(gradient, expected_gradient).min() > bound


# --- central differences ---------------------------------------------------------------------------------------------


class CentralInFloat64(NoiseConditionedPerception):
    """Central differences where rounding hides nothing."""

    _central = True


def signs_product(noise):
    """The product of the signs of each sample's elements, `(N,)`."""
    return noise.sign().flatten(1).prod(dim=1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("target_timestep", ["previous", "current", "zero"])
def test_central_gradient_is_that_of_the_side_that_the_noise_chooses(target_timestep, ref, checkpointing):
    unet, scheduler = sd15_unet().double(), ddpm()
    literal = Literal(unet, scheduler)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    batch = make_batch(unet, scheduler, (700, 30, 700, 30))
    sides = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    batch["z"][:, 0, 0, 0] *= sides * signs_product(batch["z"])
    # A large probe, so that the two sides differ.
    perception = CentralInFloat64(unet, scheduler, target_timestep=target_timestep, probe_rms=0.5)
    anchor = anchor_of(perception, batch, z=True, ref=ref)
    errors, gradient = with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])

    timesteps, x_t = batch["timesteps"], batch["x_t"]
    one, zero = torch.ones_like(x_t), torch.zeros_like(x_t)
    center_pred = batch["ref"] if ref else batch["target"]
    if target_timestep == "zero":
        abar = literal.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        k = -((1 - abar) / abar).sqrt() * one
        center, seen_at = literal.x0_and_noise(center_pred, x_t, abar)[0], torch.zeros_like(timesteps)
    else:
        k = literal.reverse_step(one, x_t, timesteps, zero) - literal.reverse_step(zero, x_t, timesteps, zero)
        center, seen_at = literal.reverse_step(center_pred, x_t, timesteps, batch["z"]), timesteps - 1
        if target_timestep == "current":
            center, seen_at = x_t, timesteps

    def features(x):
        return literal.features(x, seen_at, *batch["condition"])

    def difference(prediction, other, probe_rms):
        """The change of the features from `other` to `prediction`, and the step from the center to the plus side."""
        step = k * (prediction - other)
        size = (step.flatten(1).norm(dim=1) / math.sqrt(step[0].numel())).view(-1, 1, 1, 1).clamp(max=probe_rms)
        enlarged = step * probe_rms / size
        return (features(center + enlarged) - features(center - enlarged)) * size / (2 * probe_rms), enlarged

    # The slope of e comes from both sides.
    slope, enlarged = difference(batch["prediction"], center_pred, 0.25)
    if ref:
        ref_slope = difference(batch["ref"], batch["target"], 0.5)[0]
        assert relative_difference(anchor.ref_errors, ref_slope.square().mean(dim=(1, 2, 3))) < 1e-9
        slope = slope + ref_slope
    assert relative_difference(errors, slope.square().mean(dim=(1, 2, 3))) < 1e-9

    def pulled_back(sides):
        point = (center + sides.view(-1, 1, 1, 1) * enlarged).requires_grad_(True)
        weights = torch.linspace(1.0, 2.0, 4, dtype=torch.float64).view(-1, 1, 1, 1)
        cotangents = weights * 2 * slope / slope[0].numel()
        return k * torch.autograd.grad(features(point), point, cotangents)[0]

    assert relative_difference(gradient, pulled_back(sides)) < 1e-9
    for sample in range(4):
        assert relative_difference(gradient[[sample]], pulled_back(-sides)[[sample]]) > 1e-3


def test_the_side_is_a_fair_coin_for_each_pair_whatever_the_batch():
    unet, scheduler = sd15_unet().bfloat16(), ddpm()
    perception = NoiseConditionedPerception(unet, scheduler)

    def sides_of(noise, **options):
        zeros = torch.zeros_like(noise)
        timesteps, condition = torch.full((len(noise),), 500), torch.zeros(len(noise), 7, 16)
        return perception.anchor(Denoising(zeros, timesteps, zeros, condition, **options)).side.flatten()

    z = torch.randn(10_000, 4, 8, 8)
    sides = sides_of(z, variance_noise=z)
    assert torch.equal(sides, signs_product(z)) and set(sides.tolist()) == {1.0, -1.0}
    # Four standard deviations. The coin does not lean either where an element or the mean is known.
    assert abs(sides.mean()) < 4 / math.sqrt(10_000)
    for known in (z[:, 0, 0, 0], z[:, 3, 7, 7], z.mean(dim=(1, 2, 3)), z.square().mean(dim=(1, 2, 3)) - 1):
        assert abs((sides * known / known.std()).mean()) < 4 / math.sqrt(10_000)

    # Winners and losers have the same noise.
    few = z[:6]
    assert torch.equal(sides_of(few.repeat(2, 1, 1, 1), variance_noise=few.repeat(2, 1, 1, 1)), sides[:6].repeat(2))
    assert torch.equal(torch.cat([sides_of(part, variance_noise=part) for part in few.split(4)]), sides[:6])
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(sides_of(few, variance_noise=few.to(dtype)), sides[:6])
    assert torch.equal(sides_of(few, variance_noise=few.to(memory_format=torch.channels_last)), sides[:6])


def test_without_variance_noise_the_noisy_latents_choose_the_side():
    unet, scheduler = sd15_unet().bfloat16(), ddpm()
    batch = make_batch(unet, scheduler, dtype=torch.float32)
    batch["x_t"][:, 0, 0, 0] *= torch.tensor([1.0, -1.0, -1.0, 1.0]) * signs_product(batch["x_t"])
    anchor = anchor_of(NoiseConditionedPerception(unet, scheduler), batch)
    assert anchor.side.flatten().tolist() == [1.0, -1.0, -1.0, 1.0]


@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_encoder_runs_backward_once(dtype, ref):
    unet, scheduler = sd15_unet().to(dtype), ddpm()
    batch = make_batch(unet, scheduler, dtype=torch.float32)
    perception = NoiseConditionedPerception(unet, scheduler)
    forwards, backwards = [], []

    def watch(module, inputs, output):
        forwards.append((len(output), output.requires_grad))
        if output.requires_grad:
            output.register_hook(lambda gradient: backwards.append(len(gradient)))

    unet.requires_grad_(False).conv_in.register_forward_hook(watch)
    anchor = anchor_of(perception, batch, z=True, ref=ref)
    if dtype == torch.float32:
        assert forwards == [(8 if ref else 4, False)]
    else:
        assert forwards == ([(8, False)] if ref else [])
    forwards.clear()
    with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])
    assert forwards == [(4, False)] * (dtype != torch.float32) + [(4, True)] and backwards == [4]
    forwards.clear()
    perception.error(batch["prediction"], anchor)
    assert forwards == [(4, False)] * (1 if dtype == torch.float32 else 2) and backwards == [4]


# --- dtypes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("probe_rms", [None, 0, 0.05])
@pytest.mark.parametrize("latents_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errors_are_at_least_float32(dtype, latents_dtype, probe_rms, ref):
    unet, scheduler = sd15_unet().to(dtype), ddpm()
    batch = make_batch(unet, scheduler, dtype=dtype if latents_dtype == "same" else torch.float32)
    perception = NoiseConditionedPerception(unet, scheduler, probe_rms=probe_rms)
    anchor = anchor_of(perception, batch, ref=ref)
    errors, gradient = with_gradient(lambda p: perception.error(p, anchor), batch["prediction"])
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert errors.dtype == expected and errors.shape == (4,)
    assert not ref or anchor.ref_errors.dtype == expected
    assert gradient.dtype == batch["prediction"].dtype
    assert torch.isfinite(errors).all() and torch.isfinite(gradient).all()
    assert errors[0] == 0 and not gradient[0].any()
    assert (errors[2:] > 0).all() and gradient[2:].any()


def test_the_literal_formula_is_the_default_where_it_is_exact():
    unet, scheduler = sd15_unet().double(), ddpm()
    batch = make_batch(unet, scheduler)
    # A probe is never smaller than the step itself, so the last value has no effect.
    results = []
    for probe_rms in (None, 0, 0.005, 1e-6):
        perception = NoiseConditionedPerception(unet, scheduler, probe_rms=probe_rms)
        anchor = anchor_of(perception, batch)
        results.append(with_gradient(lambda p: perception.error(p, anchor), batch["prediction"]))
    default, literal, probed, smallest = results
    for result in (default, smallest):
        assert torch.equal(result[0], literal[0]) and torch.equal(result[1], literal[1])
    assert not torch.equal(probed[0], literal[0])
    torch.testing.assert_close(probed[0], literal[0], rtol=0.2, atol=0)
    assert cosines(probed[1][1:], literal[1][1:]).min() > 0.95


@pytest.fixture
def perception_on_cuda():
    """A perception that takes its U-Net for one in float32 on a GPU when it chooses the kind of differences."""
    perception = NoiseConditionedPerception(sd15_unet(), ddpm())
    weight = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    perception.unet = SimpleNamespace(conv_in=SimpleNamespace(weight=weight))
    return perception


@pytest.mark.parametrize(("matmul", "cudnn"), [(True, False), (False, True), (True, True), (False, False)])
def test_tf32_counts_as_half_precision(perception_on_cuda, matmul, cudnn):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        assert perception_on_cuda._central == (matmul or cudnn)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("matmul", "conv"), [("tf32", "ieee"), ("ieee", "tf32"), ("none", "tf32"), ("tf32", "tf32"), ("ieee", "ieee")]
)
def test_tf32_by_the_newer_switches(perception_on_cuda, matmul, conv):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, precision in zip(backends, (matmul, conv)):
            backend.fp32_precision = precision
        assert perception_on_cuda._central == ("tf32" in (matmul, conv))
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


@pytest.mark.parametrize("matmul", [False, True])
def test_tf32_where_only_the_older_switches_exist(monkeypatch, perception_on_cuda, matmul):
    older = SimpleNamespace(
        cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=matmul)), cudnn=SimpleNamespace(allow_tf32=False)
    )
    monkeypatch.setattr(torch, "backends", older)
    assert perception_on_cuda._central == matmul


def test_gradients_of_a_half_precision_prediction_do_not_underflow():
    unet, scheduler = sd15_unet().half(), ddpm()
    batch = make_batch(unet, scheduler, (700, 30, 700, 30), dtype=torch.float16)
    perception = NoiseConditionedPerception(unet, scheduler)
    anchor = anchor_of(perception, batch)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        model_pred = batch["prediction"].to(dtype, copy=True).requires_grad_(True)
        # The factor stands for β and a loss scaler: the result is well within fp16's range, and ∂e/∂pred itself is not.
        (perception.error(model_pred, anchor) * 2.0**20).sum().backward()
        gradients.append(model_pred.grad)
    assert gradients[1].abs().median() > 1e-4
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
def test_autocast_changes_nothing(ref, checkpointing):
    unet, scheduler = add_lora(sd15_unet()), ddpm()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    batch = make_batch(unet, scheduler, dtype=torch.float32)
    perception = NoiseConditionedPerception(unet, scheduler)

    def run():
        anchor = anchor_of(perception, batch, ref=ref)
        return *with_gradient(lambda p: perception.error(p, anchor), batch["prediction"]), anchor.ref_errors

    outside = run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    for a, b in zip(outside, inside):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
def test_no_grad(dtype, ref):
    unet, scheduler = sd15_unet().to(dtype), ddpm()
    batch = make_batch(unet, scheduler, dtype=torch.float32)
    perception = NoiseConditionedPerception(unet, scheduler)
    anchor = anchor_of(perception, batch, ref=ref)
    with_grad = perception.error(batch["prediction"].clone().requires_grad_(True), anchor)
    with torch.no_grad():
        without = perception.error(batch["prediction"].clone().requires_grad_(True), anchor)
    detached = perception.error(batch["prediction"], anchor)
    assert with_grad.grad_fn is not None
    assert without.grad_fn is None and detached.grad_fn is None
    assert torch.equal(without, with_grad) and torch.equal(detached, with_grad)


@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize(
    ("shape", "layer", "dtype"),
    [("sd15", "mid", torch.float32), ("sdxl", "mid", torch.bfloat16), ("sdxl", "down", torch.float16)],
    ids=str,
)
def test_meta_device(shape, layer, dtype, ref):
    with torch.device("meta"):
        unet = add_lora(UNETS[shape]()).to(dtype)
        condition = conditioning(unet, 4)
        latents = torch.empty(4, 4, 8, 8)
        timesteps = torch.empty(4, dtype=torch.long)
    unet.enable_gradient_checkpointing()
    perception = NoiseConditionedPerception(unet, ddpm(), layer=layer)
    anchor = perception.anchor(
        Denoising(latents, timesteps, latents, *condition, variance_noise=latents), latents if ref else None
    )
    model_pred = unet(latents.to(dtype), timesteps, condition[0], added_cond_kwargs=condition[1]).sample
    model_pred.retain_grad()
    errors = perception.error(model_pred, anchor)
    assert errors.is_meta and errors.shape == (4,)
    result = preference_loss(errors, anchor.ref_errors, loss_type="dpo" if ref else "cpo")
    result.loss.backward()
    assert result.loss.shape == () and model_pred.grad.shape == model_pred.shape
    assert all(parameter.grad.shape == parameter.shape for parameter in lora_parameters(unet).values())


# --- errors and metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("space", ["ncp", "latent"])
def test_errors_of_both_spaces(space, ref):
    unet, scheduler = sd15_unet().double(), ddpm()
    batch = make_batch(unet, scheduler)
    denoising = Denoising(batch["x_t"], batch["timesteps"], batch["target"], *batch["condition"])
    model_pred, ref_pred = denoising.predict(unet), batch["ref"] if ref else None
    inputs = batch["x_t"], batch["timesteps"], batch["condition"][0]
    assert torch.equal(model_pred, unet(*inputs, added_cond_kwargs=batch["condition"][1]).sample)
    if space == "latent":
        errors = LatentSpace.errors(denoising, model_pred, ref_pred)
        expected = [(pred - batch["target"]).square().mean(dim=(1, 2, 3)) for pred in (model_pred, batch["ref"])]
    else:
        perception = NoiseConditionedPerception(unet, scheduler)
        errors = perception.errors(denoising, model_pred, ref_pred)
        anchor = perception.anchor(denoising)
        expected = [perception.error(pred, anchor) for pred in (model_pred, batch["ref"])]
    assert relative_difference(errors.policy, expected[0]) < 1e-6
    assert relative_difference(errors.reference, expected[1]) < 1e-6 if ref else errors.reference is None


def test_metrics():
    error_w, error_l, ref_w, ref_l = (
        torch.tensor(values) for values in ([1.0, 3.0], [2.0, 2.0], [1.5, 2.5], [2.0, 1.0])
    )
    metrics = preference_metrics(error_w, error_l, ref_w, ref_l, loss_type="dpo", beta=20.0)
    # Both margins are 0.5, (1.5 - 2) - (1 - 2) and (2.5 - 1) - (3 - 2), so both logits are 5.
    assert metrics == pytest.approx(
        {
            "loss": math.log(1 + math.exp(-5)),
            "margin": 0.5,
            "implicit_accuracy": 1,
            "error_w": 2,
            "error_l": 2,
            "drift_w": 0,
            "drift_l": 0.5,
            "logit_spread": 5,
            "saturated": 0,
        }
    )
    assert preference_metrics(error_w, error_l, ref_w, ref_l, loss_type="dpo", beta=21.0)["saturated"] == 1
    # Without a reference, and with a β that scales no logits.
    assert preference_metrics(error_w, error_l, loss_type="mapo", beta=0.1).keys() == {
        "loss",
        "margin",
        "implicit_accuracy",
        "error_w",
        "error_l",
    }
    # Winners alone.
    assert preference_metrics(error_w, ref_error_w=ref_w, loss_type="sft") == {"loss": 2, "error_w": 2, "drift_w": 0}


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layer": "up"}, ["up", "mid", "down"]),
        ({"target_timestep": "next"}, ["next", "previous", "current", "zero"]),
        ({"probe_rms": -0.1}, ["probe_rms", "-0.1"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        NoiseConditionedPerception(sd15_unet(), ddpm(), **arguments)
    assert all(word in str(error.value) for word in words)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="flow"):
        NoiseConditionedPerception(sd15_unet(), ddpm("flow"))


def test_epsilon_prediction_with_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="(?i)zero.terminal"):
        NoiseConditionedPerception(sd15_unet(), ddpm("epsilon", rescale_betas_zero_snr=True))


# --- preference_loss -------------------------------------------------------------------------------------------------


ERRORS = torch.tensor([0.31, 0.12, 0.05, 0.40, 0.11, 0.09], dtype=torch.float64)
REF_ERRORS = torch.tensor([0.30, 0.15, 0.02, 0.33, 0.17, 0.08], dtype=torch.float64)


def mean_of(formula, ref=True, errors=ERRORS.tolist()):
    """The mean of `formula(m or e_w - e_l, e_w)` over the three pairs, in plain Python."""
    e, r = errors, REF_ERRORS.tolist()
    terms = []
    for winner, loser in ((0, 3), (1, 4), (2, 5)):
        difference = e[winner] - e[loser]
        margin = (r[winner] - r[loser]) - difference
        terms.append(formula(margin if ref else difference, e[winner]))
    return sum(terms) / 3


def sigma(x):
    return 1 / (1 + math.exp(-x))


def log_sigma(x):
    return math.log(sigma(x))


BETA = 40.0
FORMULAS = {
    "dpo": (True, {}, lambda m, e_w: -log_sigma(0.5 * BETA * m)),
    "dpo smoothed": (
        True,
        {"label_smoothing": 0.1},
        lambda m, e_w: -0.9 * log_sigma(0.5 * BETA * m) - 0.1 * log_sigma(-0.5 * BETA * m),
    ),
    "ipo": (True, {}, lambda m, e_w: (0.5 * BETA * m - 0.5) ** 2),
    "hinge": (True, {}, lambda m, e_w: max(0.0, 1 - 0.5 * BETA * m)),
    "cpo": (False, {"sft_weight": 0.7}, lambda d, e_w: -log_sigma(-0.5 * BETA * d) + 0.7 * e_w),
    "cpo default weight": (False, {}, lambda d, e_w: -log_sigma(-0.5 * BETA * d) + e_w),
    "cpo smoothed": (
        False,
        {"sft_weight": 0.7, "label_smoothing": 0.2},
        lambda d, e_w: -0.8 * log_sigma(-0.5 * BETA * d) - 0.2 * log_sigma(0.5 * BETA * d) + 0.7 * e_w,
    ),
    "sft": (False, {}, lambda d, e_w: e_w),
    "simpo": (False, {}, lambda d, e_w: -log_sigma(-0.5 * BETA * d - 1.0)),
    "simpo margin": (False, {"target_margin": 0.3}, lambda d, e_w: -log_sigma(-0.5 * BETA * d - 0.3)),
    "mapo": (False, {}, lambda d, e_w: e_w - BETA * log_sigma(1000 * (mapo_h(e_w) - mapo_h(e_w - d)))),
    "dmpo": (True, {}, lambda m, e_w: kullback_leibler(sigma(0.5 * BETA * m), 0.99)),
    "dpo anchored": (True, {"sft_weight": 0.7}, lambda m, e_w: -log_sigma(0.5 * BETA * m) + 0.7 * e_w),
    "simpo anchored": (False, {"sft_weight": 0.7}, lambda d, e_w: -log_sigma(-0.5 * BETA * d - 1.0) + 0.7 * e_w),
}


def mapo_h(e):
    return 0.5 * e / (math.exp(0.5 * e) - 1)


def kullback_leibler(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("name", FORMULAS)
def test_preference_loss_formulas(name):
    ref, arguments, formula = FORMULAS[name]
    errors = ERRORS.clone().requires_grad_(True)
    result = preference_loss(errors, REF_ERRORS if ref else None, loss_type=name.split()[0], beta=BETA, **arguments)
    assert result.loss.item() == pytest.approx(mean_of(formula, ref), rel=1e-12)
    result.loss.backward()
    # Central differences of the plain-Python formula.
    for i in range(len(ERRORS)):
        up, down = ERRORS.tolist(), ERRORS.tolist()
        up[i] += 1e-6
        down[i] -= 1e-6
        slope = (mean_of(formula, ref, up) - mean_of(formula, ref, down)) / 2e-6
        assert errors.grad[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_every_loss_has_its_formula_here():
    assert {name.split()[0] for name in FORMULAS} | {"linear"} == set(LOSSES)
    for name, case in FORMULAS.items():
        assert LOSSES[name.split()[0]].needs_reference == bool(case[0])
    assert all(loss.function.__doc__ for loss in LOSSES.values())


def test_linear_multiplies_the_difference_by_a_constant_clipped_slope():
    errors = ERRORS.clone().requires_grad_(True)
    result = preference_loss(errors, REF_ERRORS, loss_type="linear", beta=100.0)
    # m is 0.06, -0.03 and -0.02, so ½ - 0.2·100·m is -0.7, 1.1 and 0.9.
    slopes = [0.001, 0.999, 0.9]
    differences = [0.31 - 0.40, 0.12 - 0.11, 0.05 - 0.09]
    assert result.loss.item() == pytest.approx(sum(u * d for u, d in zip(slopes, differences)) / 3, rel=1e-12)
    result.loss.backward()
    assert errors.grad.tolist() == pytest.approx([u / 3 for u in slopes] + [-u / 3 for u in slopes], rel=1e-12)


def test_mapo_is_smooth_where_errors_vanish():
    errors = torch.tensor([0.0, 0.02 - 1e-9, 1e-6, 0.02 + 1e-9], requires_grad=True, dtype=torch.float64)
    preference_loss(errors, loss_type="mapo", beta=0.1).loss.backward()
    # h'(0) = -s/2 = -1/4. The slope is the same on both sides of the point where the series ends.
    h = [mapo_h(e) if e else 1.0 for e in errors.tolist()]
    expected = [
        0.5 - 0.1 * 0.5 * 1000 * -0.25 * sigma(-1000 * (h[0] - h[2])),
        0.1 * 0.5 * 1000 * -0.25 * sigma(-1000 * (h[0] - h[2])),
    ]
    assert errors.grad[[0, 2]].tolist() == pytest.approx(expected, rel=1e-4)
    slope = (mapo_h(0.0201) - mapo_h(0.0199)) / 2e-4
    assert errors.grad[3].item() == pytest.approx(0.05 * 1000 * slope * sigma(-1000 * (h[1] - h[3])), rel=1e-4)


@pytest.mark.parametrize("loss_type", ["dpo", "cpo", "sft", "simpo", "mapo", "linear"])
def test_winner_probability_exchanges_winner_and_loser_in_every_term(loss_type):
    p = torch.tensor([1.0, 0.7, 0.0], dtype=torch.float64)
    sft_weight = None if loss_type == "sft" else 0.3
    options = {"loss_type": loss_type, "beta": BETA, "sft_weight": sft_weight}
    errors = ERRORS.clone().requires_grad_(True)
    actual = preference_loss(errors, REF_ERRORS, winner_probability=p, **options)
    (gradient,) = torch.autograd.grad(actual.loss, errors)
    expected = 0
    for i in range(3):
        for probability, order in ((p[i], [i, i + 3]), (1 - p[i], [i + 3, i])):
            expected += probability * preference_loss(errors[order], REF_ERRORS[order], **options).loss / 3
    torch.testing.assert_close(actual.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, errors)[0], rtol=1e-12, atol=1e-15)
    # The margin is that of the labels, whatever the probability.
    assert torch.equal(actual.margin, preference_loss(errors, REF_ERRORS, **options).margin)


def test_sft_has_no_weight():
    with pytest.raises(ValueError, match="sft_weight"):
        preference_loss(ERRORS, loss_type="sft", sft_weight=1.0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_margin_and_implicit_accuracy(loss_type):
    # A win, a loss and a tie. With the reference errors the first pair is a loss.
    errors = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.3, 0.2])
    ref_errors = torch.tensor([0.1, 0.1, 0.1, 0.4, 0.1, 0.1])
    if not LOSSES[loss_type].needs_reference:
        margin = [0.2, -0.1, 0.0]
        ref_errors = None
    else:
        margin = [-0.1, -0.1, 0.0]
    result = preference_loss(errors, ref_errors, loss_type=loss_type)
    torch.testing.assert_close(result.margin, torch.tensor(margin))
    assert result.implicit_accuracy.item() == pytest.approx(0.5 if margin[0] > 0 else 1 / 6)
    assert result.loss.shape == result.implicit_accuracy.shape == ()


@pytest.mark.parametrize(("loss_type", "beta"), [("mapo", 0.1), ("linear", 100), ("simpo", 5000), ("cpo", 5000)])
def test_beta_by_default_is_that_of_the_loss(loss_type, beta):
    errors = 1e-3 * ERRORS, 1e-3 * REF_ERRORS, loss_type
    assert (
        preference_loss(*errors).loss == preference_loss(*errors, beta).loss != preference_loss(*errors, 2 * beta).loss
    )


def test_default_beta_and_loss_type():
    expected = mean_of(lambda m, e_w: -log_sigma(0.5 * 5000.0 * m * 1e-3))
    assert preference_loss(ERRORS * 1e-3, REF_ERRORS * 1e-3).loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "hinge", "dmpo", "linear"])
def test_missing_reference_errors(loss_type):
    with pytest.raises(ValueError, match="ref_errors"):
        preference_loss(ERRORS, loss_type=loss_type)


def test_unknown_loss_type_is_named_with_the_valid_ones():
    with pytest.raises(ValueError) as error:
        preference_loss(ERRORS, REF_ERRORS, loss_type="sigmoid")
    assert all(word in str(error.value) for word in ("sigmoid", *LOSSES))


def test_odd_number_of_errors():
    with pytest.raises(ValueError, match="5"):
        preference_loss(ERRORS[:5], REF_ERRORS[:5])


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
@pytest.mark.parametrize("loss_type", ["dpo", "cpo"])
def test_label_smoothing_outside_its_range(loss_type, label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        preference_loss(ERRORS, REF_ERRORS, loss_type=loss_type, label_smoothing=label_smoothing)


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - {"dpo", "cpo"}))
def test_label_smoothing_where_it_means_nothing(loss_type):
    with pytest.raises(ValueError, match="label_smoothing"):
        preference_loss(ERRORS, REF_ERRORS, loss_type=loss_type, label_smoothing=0.1)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_margins_stay_finite(loss_type, label_smoothing, sign):
    if label_smoothing and loss_type not in ("dpo", "cpo"):
        label_smoothing = 0.0
    errors = torch.tensor([1e3, 1e3, 0.0, 0.0] if sign > 0 else [0.0, 0.0, 1e3, 1e3], requires_grad=True)
    result = preference_loss(errors, torch.zeros(4), loss_type=loss_type, beta=5000.0, label_smoothing=label_smoothing)
    result.loss.backward()
    assert torch.isfinite(result.loss) and torch.isfinite(errors.grad).all()
    if loss_type == "dpo" and sign > 0:
        assert result.loss.item() == pytest.approx((1 - label_smoothing) * 2.5e6, rel=1e-6)
        # For a pair that is far on the wrong side, the slope is that of the logit. It does not vanish.
        torch.testing.assert_close(errors.grad.abs(), torch.full((4,), (1 - label_smoothing) * 1250.0))


# --- error_scale -----------------------------------------------------------------------------------------------------


def test_error_scale_is_the_ratio_of_geometric_means_and_has_a_standard_error():
    latent, feature = torch.tensor([0.5, -2.0, 0.0, 1.0]), torch.tensor([-0.001, 0.002, 0.3, 0.004])
    logs = [math.log(500), math.log(1000), math.log(250)]
    scale, standard_error = error_scale(latent, feature)
    assert scale == pytest.approx((500 * 1000 * 250) ** (1 / 3))
    mean = sum(logs) / 3
    assert standard_error == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3))
    # A margin of 0, as at the first timestep, does not count.
    with pytest.raises(ValueError, match="1 pairs have margins"):
        error_scale(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.1]))


def test_error_scale_is_steady_where_tails_are_heavy():
    # Student's t with 3 degrees of freedom: a ratio of standard deviations of 200 pairs would vary far more.
    tails = torch.distributions.StudentT(3.0)
    latent, feature = tails.sample((2, 50, 200))
    logs = [math.log(error_scale(700 * a, b)[0] / 700) for a, b in zip(latent, feature)]
    errors = [error_scale(a, b)[1] for a, b in zip(latent, feature)]
    assert abs(sum(logs) / 50) < 0.05
    spread = torch.tensor(logs).std().item()
    assert spread == pytest.approx(sum(errors) / 50, rel=0.3) and spread < 0.15


# --- latent_error ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_latent_error(dtype):
    model_pred = torch.randn(4, 4, 8, 8).to(dtype).requires_grad_(True)
    target = torch.randn(4, 4, 8, 8).to(dtype)
    errors = latent_error(model_pred, target)
    assert errors.dtype == torch.promote_types(dtype, torch.float32)
    difference = (model_pred.detach().double() - target.double()).flatten(1)
    # The subtraction is in float32 or float64, so it adds no rounding of its own.
    torch.testing.assert_close(errors.detach().double(), difference.square().mean(dim=1), rtol=1e-5, atol=0)
    errors.sum().backward()
    expected = (2 * difference / difference.shape[1]).view(model_pred.shape)
    torch.testing.assert_close(model_pred.grad, expected.to(dtype))


# --- adapters_disabled -----------------------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    """A U-Net with LoRA, a function that runs it, and the output of its base."""
    unet = sd15_unet()
    batch = make_batch(unet, ddpm(), dtype=torch.float32)

    def forward():
        with torch.no_grad():
            return unet(batch["x_t"], batch["timesteps"], batch["condition"][0]).sample

    base = forward()
    add_lora(unet)
    assert not torch.allclose(forward(), base)
    return unet, forward, base


def test_adapters_disabled_gives_the_base_model(adapted):
    unet, forward, base = adapted
    policy = forward()
    with adapters_disabled(unet):
        assert torch.equal(forward(), base)
    assert torch.equal(forward(), policy)


def test_adapters_disabled_restores_requires_grad(adapted):
    unet, forward, base = adapted
    # There is a second, frozen adapter, and one weight of the trained adapter is frozen.
    unet.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS), adapter_name="frozen")
    unet.set_adapter("default")
    for name, parameter in unet.named_parameters():
        if ".frozen." in name:
            parameter.requires_grad_(False)
    next(iter(lora_parameters(unet).values())).requires_grad_(False)
    policy = forward()
    flags = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    assert len(set(flags.values())) == 2
    with adapters_disabled(unet):
        assert torch.equal(forward(), base)
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == flags
    assert torch.equal(forward(), policy)


def test_adapters_disabled_nests(adapted):
    unet, forward, base = adapted
    policy = forward()
    with adapters_disabled(unet):
        with adapters_disabled(unet):
            assert torch.equal(forward(), base)
        assert torch.equal(forward(), base)
    assert torch.equal(forward(), policy)
    assert all(parameter.requires_grad for parameter in lora_parameters(unet).values())


def test_adapters_disabled_keeps_what_the_user_disabled(adapted):
    unet, forward, base = adapted
    unet.disable_adapters()
    with adapters_disabled(unet):
        assert torch.equal(forward(), base)
    assert torch.equal(forward(), base)


def test_adapters_disabled_restores_after_an_exception(adapted):
    unet, forward, base = adapted
    policy = forward()
    with pytest.raises(RuntimeError, match="inside"):
        with adapters_disabled(unet):
            raise RuntimeError("inside")
    assert torch.equal(forward(), policy)
    assert all(parameter.requires_grad for parameter in lora_parameters(unet).values())


def test_perturbed_policy_changes_each_layer_by_a_share_of_its_weight(adapted):
    unet, forward, _ = adapted
    policy = forward()
    layers = [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer.get_delta_weight("default").detach().clone() for layer in layers]
    with pytest.raises(RuntimeError, match="inside"):
        with perturbed_policy(unet, torch.Generator().manual_seed(0)):
            for layer, delta_weight in zip(layers, before):
                change = layer.get_delta_weight("default") - delta_weight
                torch.testing.assert_close(change.norm(), 0.02 * layer.base_layer.weight.norm())
            assert not torch.allclose(forward(), policy)
            raise RuntimeError("inside")
    assert layers and torch.equal(forward(), policy)
    assert all(parameter.requires_grad for parameter in lora_parameters(unet).values())


def test_adapters_disabled_finds_adapters_that_peft_added():
    unet = sd15_unet()
    batch = make_batch(unet, ddpm(), dtype=torch.float32)

    def forward(unet):
        with torch.no_grad():
            return unet(batch["x_t"], batch["timesteps"], batch["condition"][0]).sample

    base = forward(unet)
    wrapped = get_peft_model(unet, LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))
    assert not torch.allclose(forward(wrapped), base)
    with adapters_disabled(wrapped):
        assert torch.equal(forward(wrapped), base)


@pytest.mark.parametrize("installed", [True, False])
def test_adapters_disabled_without_adapters(monkeypatch, installed):
    if not installed:
        monkeypatch.delitem(sys.modules, "peft")
    unet = sd15_unet()
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    with adapters_disabled(unet):
        assert [parameter.requires_grad for parameter in unet.parameters()] == flags
    assert [parameter.requires_grad for parameter in unet.parameters()] == flags


# --- reference_model -------------------------------------------------------------------------------------------------


def add_loras(unet, seeds=(1, 2), reference_targets=LORA_TARGETS, targets=LORA_TARGETS):
    """Adds a frozen adapter "reference" and then the trained adapter "default"."""
    add_lora(unet, seed=seeds[0], adapter_name="reference", target_modules=reference_targets)
    return add_lora(unet, seed=seeds[1], target_modules=targets)


def predict(unet, batch):
    encoder_hidden_states, added_cond_kwargs = batch["condition"]
    inputs = (batch["x_t"], batch["timesteps"], encoder_hidden_states)
    return unet(*inputs, added_cond_kwargs=added_cond_kwargs).sample


def predict_reference(unet, batch):
    with torch.no_grad(), reference_model(unet):
        return predict(unet, batch)


def adapter_state(unet):
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    switches = [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    return switches, [parameter.requires_grad for parameter in unet.parameters()]


@pytest.mark.parametrize("targets", [LORA_TARGETS, LORA_TARGETS + CONVOLUTIONS], ids=["attention", "convolutions"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("shape", UNETS)
def test_adapters_of_equal_weights_predict_the_same_and_the_margin_is_zero(shape, autocast, targets):
    unet, scheduler = UNETS[shape](), ddpm()
    batch = make_batch(unet, scheduler, (700, 30, 700, 30), dtype=torch.float32)
    base = predict(unet, batch).detach()
    add_loras(unet, seeds=(1, 1), reference_targets=targets, targets=targets)
    unet.train()
    if autocast:
        # As in the scripts: frozen weights are in half precision, those of the adapters in float32.
        for name, parameter in unet.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model_pred, ref_pred = predict(unet, batch), predict_reference(unet, batch)
        perception = NoiseConditionedPerception(unet, scheduler)
        anchor = anchor_of(perception, {**batch, "ref": ref_pred}, z=True, ref=True)
        errors = perception.error(model_pred, anchor)
    assert torch.equal(model_pred, ref_pred) and not torch.allclose(ref_pred.float(), base, atol=0.01)
    latent_errors = [latent_error(prediction, batch["target"]) for prediction in (model_pred, ref_pred)]
    for policy, reference in (latent_errors, (errors, anchor.ref_errors)):
        assert (preference_loss(policy, reference).margin == 0).all() and (reference > 0).all()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("create_unet", [sd15_unet, sdxl_unet])
def test_policy_and_reference_are_each_those_of_a_unet_with_one_adapter(create_unet, checkpointing):
    scheduler = ddpm()
    unet = add_loras(create_unet()).double()
    batch = make_batch(unet, scheduler, (700, 30, 700, 30))
    policy, reference = (add_lora(create_unet(), seed=seed).double() for seed in (2, 1))
    for model in (unet, policy):
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
    batch["ref"] = predict_reference(unet, batch)
    assert torch.equal(batch["ref"], predict(reference, batch))
    state, grads = adapter_state(unet), []
    for model in (unet, policy):
        perception = NoiseConditionedPerception(model, scheduler)
        model_pred = predict(model, batch)
        # The second reference prediction comes between the policy's forward and backward passes.
        assert torch.equal(predict_reference(unet, batch), batch["ref"])
        anchor = anchor_of(perception, batch, ref=True)
        errors = perception.error(model_pred, anchor)
        preference_loss(errors, anchor.ref_errors, beta=1e6).loss.backward()
        grads.append({name: value.grad for name, value in lora_parameters(model).items() if ".default." in name})
    assert adapter_state(unet) == state
    for name, grad in grads[1].items():
        assert grad is not None and torch.equal(grads[0][name], grad), name
    assert any(grad.any() for grad in grads[0].values())
    assert all(value.grad is None for name, value in unet.named_parameters() if ".default." not in name)


def test_the_perceptual_encoder_has_no_adapter_whatever_surrounds_it():
    base, scheduler = sd15_unet().double(), ddpm()
    batch = make_batch(base, scheduler)

    def run(unet):
        perception = NoiseConditionedPerception(unet, scheduler)
        anchor = anchor_of(perception, batch, ref=True)
        return *with_gradient(lambda p: perception.error(p, anchor), batch["prediction"]), anchor.ref_errors

    expected = run(base)
    unet = add_loras(copy.deepcopy(base)).double()
    state = adapter_state(unet)
    with reference_model(unet):
        inside = run(unet)
    for actual in (run(unet), inside):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    assert adapter_state(unet) == state


def test_layers_without_the_reference_adapter_are_off_in_the_reference():
    unet = sd15_unet()
    batch = make_batch(unet, ddpm(), dtype=torch.float32)
    expected = predict(add_lora(sd15_unet(), seed=1, target_modules=["to_q", "conv1"]), batch)
    add_loras(unet, reference_targets=["to_q", "conv1"])
    state, policy = adapter_state(unet), predict(unet, batch)
    assert torch.equal(predict_reference(unet, batch), expected)
    assert adapter_state(unet) == state and torch.equal(predict(unet, batch), policy)


def test_without_a_reference_adapter_the_reference_is_the_base(adapted):
    unet, forward, base = adapted
    policy, state = forward(), adapter_state(unet)
    with reference_model(unet):
        assert torch.equal(forward(), base)
    assert torch.equal(forward(), policy) and adapter_state(unet) == state
    plain = sd15_unet()
    with reference_model(plain):
        assert all(parameter.requires_grad for parameter in plain.parameters())


def test_reference_model_nests_and_restores_after_an_exception():
    unet = sd15_unet()
    batch = make_batch(unet, ddpm(), dtype=torch.float32)
    base = predict(unet, batch)
    add_loras(unet)
    policy, reference, states = predict(unet, batch), predict_reference(unet, batch), [adapter_state(unet)]
    assert not torch.allclose(policy, reference) and not torch.allclose(reference, base)
    with pytest.raises(RuntimeError, match="inside"):
        with reference_model(unet):
            states.append(adapter_state(unet))
            with adapters_disabled(unet):
                assert torch.equal(predict(unet, batch), base)
                with reference_model(unet):
                    assert torch.equal(predict(unet, batch), reference)
                assert torch.equal(predict(unet, batch), base)
            with reference_model(unet):
                assert torch.equal(predict(unet, batch), reference)
            assert torch.equal(predict(unet, batch), reference) and adapter_state(unet) == states[1]
            raise RuntimeError("inside")
    assert adapter_state(unet) == states[0] and torch.equal(predict(unet, batch), policy)
    # `requires_grad` is the same inside and outside.
    assert states[0][1] == states[1][1] and states[0][0] != states[1][0]
