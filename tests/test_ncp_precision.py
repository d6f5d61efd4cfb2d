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

"""Compares the perceptual error in half precision with the literal formula in float64, by `benchmarks/precision.py`."""

import copy
from pathlib import Path

import precision
import pytest
import torch
from conftest import fails_on_amd
from ncp_loss import Denoising, NoiseConditionedPerception

from diffusers import UNet2DConditionModel


DEFAULTS = {
    "fp32": precision.Variant(torch.float32),
    "fp16": precision.Variant(torch.float16),
    "bf16": precision.Variant(torch.bfloat16),
}
HALF = ["fp16", "bf16"]
SMALL_WORLD = Path(__file__).resolve().parents[1] / "assets/small-world"

# The tests share one measurement, so they run in one process.
pytestmark = pytest.mark.xdist_group("precision")


@pytest.fixture(scope="module")
def measured():
    return precision.measure(DEFAULTS)


@fails_on_amd
@pytest.mark.parametrize("rms", precision.PREDICTION_RMS)
@pytest.mark.parametrize(
    ("name", "mean", "smallest"), [("fp32", 0.9999, 0.9999), ("fp16", 0.998, 0.99), ("bf16", 0.975, 0.92)]
)
def test_gradient_points_the_right_way(measured, name, mean, smallest, rms):
    assert measured[name].mean_cosine[rms] >= mean
    assert measured[name].min_cosine[rms] >= smallest


@pytest.mark.parametrize("rms", precision.PREDICTION_RMS)
@pytest.mark.parametrize(("name", "bound"), [("fp16", 0.02), ("bf16", 0.08)])
def test_error_is_right(measured, name, bound, rms):
    assert measured[name].mean_error[rms] <= bound


@pytest.mark.parametrize(("name", "bound"), [("fp16", 0.99), ("bf16", 0.97)])
def test_margin_follows_the_exact_one(measured, name, bound):
    assert measured[name].correlation >= bound
    assert measured[name].right_sign >= 0.95


@pytest.fixture(scope="module")
def ranges_of_timesteps():
    half = {name: DEFAULTS[name] for name in HALF}
    return [result for _, result in precision.measure_model(SMALL_WORLD, half, pairs=4)]


# The encoder is more curved with trained weights than with random ones, so the gradient at one side needs a small probe.
@pytest.mark.parametrize(("name", "bound"), [("fp16", 0.998), ("bf16", 0.994)])
def test_precision_on_trained_weights(ranges_of_timesteps, name, bound):
    results = [result[name] for result in ranges_of_timesteps]
    cosines = [result["mean_cosine"] for result in results]
    assert sum(cosines) / len(cosines) >= bound
    assert min(cosines) >= 0.98
    assert sum(result["right_sign"] for result in results) / len(results) >= 0.95
    assert max(result["mean_error"] for result in results) <= 0.08


@pytest.mark.parametrize("name", DEFAULTS)
def test_gradient_does_not_underflow(measured, name):
    assert measured[name].zeros < 1e-3


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_many_features_do_not_underflow_in_fp16(loss_scale):
    torch.manual_seed(0)
    # The features have the height and width of the latents and sixteen times as many channels.
    base = UNet2DConditionModel(
        block_out_channels=(64,),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).requires_grad_(False)
    for parameter in base.parameters():
        parameter.data = precision.exact_in_half(parameter.data).float()
    exact, half = copy.deepcopy(base).double(), precision.accumulate_in_float32(copy.deepcopy(base).half())
    scheduler = precision.SCHEDULERS["v_prediction"]
    timesteps = torch.tensor([1, 500, 950])
    latents, target, off = torch.randn(3, 3, 4, 32, 32)
    prediction = target + 0.05 * off
    encoder_hidden_states = precision.exact_in_half(torch.randn(3, 7, 16))
    condition = (encoder_hidden_states.double(), None)

    no_noise = torch.zeros_like(latents).double()
    batch = precision.Batch(latents.double(), timesteps, target.double(), condition, no_noise)
    (errors,), expected = precision.literal_errors(exact, (prediction.double(),), batch, scheduler)
    # A plain backward pass would start with numbers that fp16 rounds to its smallest one, or to zero.
    n = precision.literal_features(exact, latents.double(), timesteps, *condition)[0].numel()
    assert n == 16 * latents[0].numel()
    assert (2 / n * errors.sqrt()).max() < 2**-23

    perception = NoiseConditionedPerception(half, scheduler)
    anchor = perception.anchor(Denoising(latents, timesteps, target, encoder_hidden_states))
    prediction.requires_grad_(True)
    (perception.error(prediction, anchor).sum() * loss_scale).backward()
    gradient = prediction.grad / loss_scale
    assert (gradient == 0).double().mean() < 1e-3
    assert precision.cosine_of(gradient.double(), expected).min() >= 0.99
    ratio = gradient.double().flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.05, atol=0)
