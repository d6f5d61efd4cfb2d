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

"""The policy's LoRA layers do what PEFT's do, with fewer kernels."""

import copy
import importlib
from types import SimpleNamespace

import ncp_loss
import pytest
import torch
from conftest import SCRIPTS
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_unets import UNETS, conditioning, lora_parameters


def create_policy(kind, dtype, pretrained_lora=None, learnt=True, seed=0, **options):
    """The script's policy over a tiny U-Net, and a function that predicts with it in autocast."""
    unet = UNETS[kind](seed)
    latents = torch.randn(2, 4, 8, 8)
    encoder_hidden_states, added_cond_kwargs = conditioning(unet, 2)

    def predict(policy):
        # Autocast has no float64.
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and policy.dtype == dtype):
            inputs = latents.to(policy.dtype), torch.tensor([10, 900]), encoder_hidden_states.to(policy.dtype)
            return policy(*inputs, added_cond_kwargs=added_cond_kwargs).sample

    args = {"rank": 4, "lora_alpha": 8, "gradient_checkpointing": False, "channels_last": False, "compile": False}
    script = importlib.import_module(SCRIPTS[kind])
    policy = script.create_policy(SimpleNamespace(**{**args, **options}), unet.to(dtype), pretrained_lora)
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer) and learnt:
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    return policy, predict


def with_layers_of_peft(policy):
    policy = copy.deepcopy(policy)
    for layer in policy.modules():
        if isinstance(layer, LoraLinear):
            layer.__class__ = LoraLinear
    return policy


def predict_and_differentiate(policy, predict):
    prediction = predict(policy)
    prediction.float().square().mean().backward()
    return prediction.detach(), torch.cat(
        [weight.grad.flatten() for weight in policy.parameters() if weight.requires_grad]
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 0), (torch.float16, 1.5), (torch.bfloat16, 1.5)], ids=["fp32", "fp16", "bf16"]
)
def test_layers_predict_as_those_of_peft(kind, dtype, tolerance, checkpointing):
    # Of our layers and PEFT's, in predictions and gradients. One draw of weights may favour either.
    errors, sizes = torch.zeros(2, 2), torch.zeros(2)
    for seed in range(4):
        policy, predict = create_policy(kind, dtype, seed=seed, gradient_checkpointing=checkpointing)
        peft = with_layers_of_peft(policy)
        assert type(policy.mid_block.attentions[0].transformer_blocks[0].attn1.to_q) is not LoraLinear
        assert policy.state_dict().keys() == peft.state_dict().keys()
        exact = predict_and_differentiate(with_layers_of_peft(policy).double(), predict)
        sizes += torch.stack([value.norm() for value in exact])
        for row, model in enumerate((policy, peft)):
            found = predict_and_differentiate(model, predict)
            errors[row] += torch.stack([(value - wanted).norm() for value, wanted in zip(found, exact)])
    # Rounded once instead of twice, ours are no further from the exact values.
    assert (errors[0] <= tolerance * errors[1] + 1e-5 * sizes).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_layers_are_off_with_the_adapter(kind, dtype):
    policy, predict = create_policy(kind, dtype)
    base = predict(UNETS[kind]().to(dtype))
    assert not torch.equal(predict(policy), base)
    with ncp_loss.adapters_disabled(policy):
        assert torch.equal(predict(policy), base)
    policy.disable_adapters()
    assert torch.equal(predict(policy), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_new_lora_changes_no_bit(kind, dtype):
    policy, predict = create_policy(kind, dtype, learnt=False)
    prediction = predict(policy)
    with ncp_loss.reference_model(policy):
        assert torch.equal(predict(policy), prediction)


def test_a_new_lora_has_no_second_adapter(kind):
    policy, _ = create_policy(kind, torch.bfloat16, learnt=False)
    lora, layers = lora_parameters(policy), [name for name, _ in UNETS[kind]().named_modules()]
    layers = [name for name in layers if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert lora.keys() == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in lora.values())
    assert len(list(policy.parameters())) == len(list(UNETS[kind]().parameters())) + len(lora)
    assert not any(weight.requires_grad for name, weight in policy.named_parameters() if name not in lora)
    assert list(policy.peft_config) == ["default"]


@pytest.mark.parametrize("targets", [["to_q"], ["conv1", "to_q"]], ids=["attention", "convolutions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_policy_and_reference_of_a_pretrained_lora_agree_to_the_bit(kind, dtype, targets):
    unet = UNETS[kind]()
    unet.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    names = [name for name, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer)]
    weights = {
        f"{name}.{side}.weight": getattr(unet.get_submodule(name), side)["default"].weight.data
        for name in names
        for side in ("lora_A", "lora_B")
    }
    config = LoraConfig(r=3, lora_alpha=2, target_modules=names)
    policy, predict = create_policy(kind, dtype, (weights, config), learnt=False)
    lora = lora_parameters(policy)
    adapters = {
        name: [lora[name.replace(".weight", f".{part}.weight")] for part in ("default", "reference")]
        for name in weights
    }
    assert len(lora) == 2 * len(weights)
    for name, (trained, reference) in adapters.items():
        assert trained.requires_grad and not reference.requires_grad
        assert trained.dtype == reference.dtype == torch.float32
        assert torch.equal(trained, weights[name]) and torch.equal(reference, weights[name])
    prediction = predict(policy)
    with ncp_loss.reference_model(policy):
        assert torch.equal(predict(policy), prediction)
    with ncp_loss.adapters_disabled(policy):
        assert not torch.equal(predict(policy), prediction)


def test_layers_outside_autocast_and_variants_are_those_of_peft(kind):
    policy, predict = create_policy(kind, torch.bfloat16)
    layer = policy.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16)
    expected = LoraLinear.forward(layer, x)
    assert torch.equal(layer(x), expected) and expected.dtype == torch.bfloat16
    policy.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_q"]), "dora")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), LoraLinear.forward(layer, x))
        policy.set_adapter(["default", "dora"])
        assert torch.equal(layer(x), LoraLinear.forward(layer, x))
