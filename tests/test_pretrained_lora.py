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

"""A LoRA that exists gives the starting weights, and a frozen copy of it is the reference."""

import json
import math
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SCRIPTS, Run, fails_on_amd
from packaging.version import Version
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from test_training import draw
from tiny_unets import sd15_unet
from train_ncp_dpo_sd15 import KOHYA_WEIGHTS_NAME, WEIGHTS_NAME, save_kohya_lora
from transformers import CLIPTextModel

import diffusers
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft


OPTIONS = {"loss_space": "latent", "learning_rate": 3e-2, "rank": 8, "lora_alpha": 2, "max_train_steps": 4}
TEXT_ENCODER_KEY = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def trained(checkpoints, parquet, tmp_path_factory):
    """Folders of LoRAs that change pictures."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "output" for kind in SCRIPTS}
    for kind, folder in folders.items():
        Run(kind, checkpoints[kind], parquet, folder)(**OPTIONS)
    return folders


@pytest.fixture
def first(run, trained):
    """The script, and the folder of a LoRA that changes pictures."""
    return run, trained[run.kind]


@pytest.mark.parametrize("space", ["latent", "ncp"])
@pytest.mark.parametrize(
    "precision, name", [("no", WEIGHTS_NAME), ("bf16", WEIGHTS_NAME), ("bf16", KOHYA_WEIGHTS_NAME)]
)
def test_training_starts_from_it(first, space, precision, name):
    run, folder = first
    run(loss_space=space, mixed_precision=precision, pretrained_lora_path=folder / name)
    # Policy and reference are one, until the policy has learnt.
    assert run.scalars("margin")[0] == run.scalars("drift_w")[0] == 0 and run.scalars("drift_w")[1] != 0
    assert run.scalars("loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    with safe_open(run.output_dir / KOHYA_WEIGHTS_NAME, framework="pt") as file:
        assert file.metadata()["ncp_pretrained_lora"] == name
        assert file.metadata()["ss_network_dim"] == "8" and file.metadata()["ss_network_alpha"] == "2"
    assert f"| pretrained_lora | {name} |" in (run.output_dir / "README.md").read_text(encoding="utf-8")


def test_the_result_replaces_it(first, checkpoints):
    run, folder = first
    run(**{**OPTIONS, "learning_rate": 0}, pretrained_lora_path=folder)
    drawn = []
    for path in (folder, run.output_dir):
        pipeline = DiffusionPipeline.from_pretrained(checkpoints[run.kind])
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(path)
        drawn.append(draw(pipeline))
    np.testing.assert_array_equal(*drawn)
    before = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    assert all(torch.equal(weight, before[name]) for name, weight in run.lora().items())


def test_ranks_and_alphas_by_layer(first):
    run, folder = first
    kohya = safetensors.torch.load_file(folder / KOHYA_WEIGHTS_NAME)
    layer = next(name for name in kohya if name.endswith("attn1_to_q.lora_down.weight")).removesuffix(
        ".lora_down.weight"
    )
    kohya[f"{layer}.alpha"] = torch.tensor(1.0)
    for name, dim in ((f"{layer}.lora_down.weight", 0), (f"{layer}.lora_up.weight", 1)):
        kohya[name] = kohya[name].narrow(dim, 0, 3).contiguous()
    other = run.output_dir.with_name("other.safetensors")
    safetensors.torch.save_file(kohya, other)
    run(loss_space="latent", learning_rate=0, pretrained_lora_path=other)
    written = safetensors.torch.load_file(run.output_dir / KOHYA_WEIGHTS_NAME)
    assert written.keys() == kohya.keys() and all(torch.equal(written[name], kohya[name]) for name in kohya)
    with pytest.raises(ValueError, match=r"--rank is 8, but --pretrained_lora_path .*other.safetensors has \[3, 8\]"):
        run.into("refused")(rank=8, pretrained_lora_path=other)


PATTERNS = {
    # Convolutions of all kinds, and linear layers outside of attention.
    "target_modules": ["to_q", "conv_in", "conv1", "conv_shortcut", "downsamplers.0.conv", "proj_in", "ff.net.2"],
    "r": 4,
    "lora_alpha": 2,
    "rank_pattern": {"conv1": 2, "mid_block.attentions.0.proj_in": 3},
    "alpha_pattern": {"conv_in": 8, "down_blocks.*.to_q": 1},
}
if Version(diffusers.__version__) < Version("0.39.0"):
    # These read no conv_in in kohya's format.
    PATTERNS["target_modules"].remove("conv_in")


@pytest.fixture
def other_lora(run, checkpoints, tmp_path):
    """The script, the folder of a LoRA as PEFT and diffusers write it, its weights and the strength of each layer."""
    unet = UNet2DConditionModel.from_pretrained(checkpoints[run.kind], subfolder="unet")
    torch.manual_seed(0)
    config = LoraConfig(**PATTERNS, use_rslora=run.kind == "sdxl", init_lora_weights=False)
    unet.add_adapter(config)
    lora = {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(unet).items()}
    folder, strengths = tmp_path / "other", layer_strengths(unet)
    folder.mkdir()
    metadata = {f"unet.{name}": value for name, value in config.to_dict().items()}
    safetensors.torch.save_file(
        lora, folder / WEIGHTS_NAME, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, default=list)}
    )
    ranks = {name.removeprefix("unet.").removesuffix(".lora_A.weight"): len(lora[name]) for name in lora}
    alphas = {layer: strengths[layer] * ranks[layer] for layer in strengths}
    save_kohya_lora(folder / KOHYA_WEIGHTS_NAME, lora, alphas, {})
    return run, folder, lora, strengths


def layer_strengths(unet):
    """What each layer's update is multiplied by."""
    layers = ((name, layer) for name, layer in unet.named_modules() if isinstance(layer, LoraLayer))
    return {name: layer.scaling[layer.active_adapters[0]] for name, layer in layers}


def loaded_strengths(checkpoint, folder):
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    pipeline.load_lora_weights(folder, weight_name=WEIGHTS_NAME)
    return layer_strengths(pipeline.unet)


@fails_on_amd
def test_layers_of_all_kinds_keep_weights_and_strength(other_lora, checkpoints):
    run, folder, lora, strengths = other_lora
    assert len({round(strength, 5) for strength in strengths.values()}) >= 4
    assert loaded_strengths(checkpoints[run.kind], folder) == pytest.approx(strengths)
    for source in (folder, folder / KOHYA_WEIGHTS_NAME):
        run.into(f"of {source.name}")(loss_space="latent", learning_rate=0, pretrained_lora_path=source)
        assert run.scalars("margin") == [0, 0]
        written = convert_unet_state_dict_to_peft(run.lora())
        assert written.keys() == lora.keys() and all(torch.equal(written[name], lora[name]) for name in lora)
        assert loaded_strengths(checkpoints[run.kind], run.output_dir) == pytest.approx(strengths)
        kohya = [safetensors.torch.load_file(path / KOHYA_WEIGHTS_NAME) for path in (folder, run.output_dir)]
        assert kohya[0].keys() == kohya[1].keys()
        for name in kohya[0]:
            torch.testing.assert_close(kohya[1][name], kohya[0][name], rtol=1e-6, atol=0)


@fails_on_amd
def test_layers_of_all_kinds_are_trained(other_lora, checkpoints):
    run, folder, lora, strengths = other_lora
    run(pretrained_lora_path=folder)
    assert run.scalars("margin")[0] == run.scalars("drift_w")[0] == 0 and run.scalars("drift_w")[1] != 0
    trained = convert_unet_state_dict_to_peft(run.lora())
    assert trained.keys() == lora.keys() and not any(torch.equal(trained[name], lora[name]) for name in lora)
    assert loaded_strengths(checkpoints[run.kind], run.output_dir) == pytest.approx(strengths)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "what, faults",
    [
        ("dora", ["holds unet.*lora_magnitude_vector", "diffusers drops 14 of its weights"]),
        ("text_encoder", ["holds text_encoder", "holds text_encoder"]),
    ],
)
def test_what_is_no_plain_lora_of_a_unet_is_refused(run_sd15, checkpoints, tmp_path, no_models, what, faults):
    if what == "dora":
        part, model, targets = "unet", sd15_unet(), ["to_q"]
    else:
        part, targets = "text_encoder", ["q_proj", "out_proj"]
        model = CLIPTextModel.from_pretrained(checkpoints["sd15"], subfolder=part)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, use_dora=what == "dora"))
    lora = get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **{f"{part}_lora_layers": lora})
    kohya = convert_state_dict_to_kohya({f"{part}.{name}": weight for name, weight in lora.items()})
    # diffusers does not give a DoRA's scales kohya's names.
    kohya = {re.sub(r"\.(\w+)\.lora_magnitude_vector", r"_\1.dora_scale", name): kohya[name] for name in kohya}
    safetensors.torch.save_file(kohya, tmp_path / "kohya.safetensors")
    for path, fault in ((tmp_path / "lora", faults[0]), (tmp_path / "kohya.safetensors", faults[1])):
        with pytest.raises(ValueError, match=f"--pretrained_lora_path {path}:? {fault}"):
            run_sd15(pretrained_lora_path=path)


def test_a_lora_in_kohyas_format_is_the_same(first):
    run, folder = first
    run(pretrained_lora_path=folder, **OPTIONS)
    lora = run.lora()
    kohya = run.into("kohya")
    kohya(pretrained_lora_path=folder / KOHYA_WEIGHTS_NAME, **OPTIONS)
    for name, weight in kohya.lora().items():
        torch.testing.assert_close(weight, lora[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd15"])
def test_a_resumed_run_starts_from_it_again(first):
    run, folder = first
    options = {**OPTIONS, "pretrained_lora_path": folder, "checkpointing_steps": 2}
    run(**options)
    uninterrupted = run.lora()
    resumed = run.into("resumed")
    resumed(**{**options, "max_train_steps": 2})
    resumed(**options, resume_from_checkpoint="latest")
    assert all(torch.equal(weight, uninterrupted[name]) for name, weight in resumed.lora().items())
    with pytest.raises(ValueError, match="--pretrained_lora_path is None, but was '.*output'"):
        resumed(**{**OPTIONS, "max_train_steps": 6}, resume_from_checkpoint="latest")


@pytest.mark.bad_input
def test_a_lora_that_does_not_fit_is_named(checkpoints, parquet, tmp_path):
    run, missing = Run("sd15", checkpoints["sd15"], parquet, tmp_path / "output"), tmp_path / "nothing"
    with pytest.raises(ValueError, match=f"--pretrained_lora_path {missing} cannot be read as a LoRA: "):
        run(pretrained_lora_path=missing)

    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{layer}.lora_A.weight": torch.zeros(4, 3), f"{layer}.lora_B.weight": torch.zeros(3, 4)}
    other = tmp_path / "other"
    other.mkdir()
    safetensors.torch.save_file(lora, other / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="--pretrained_lora_path .*other .*size mismatch"):
        run(pretrained_lora_path=other)

    run(**OPTIONS)
    more = {**run.lora(), **{name.replace("attn1", "attn7"): weight for name, weight in lora.items()}}
    safetensors.torch.save_file(more, other / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="--pretrained_lora_path .*other .*attn7"):
        run.into("more")(pretrained_lora_path=other)

    safetensors.torch.save_file({**lora, TEXT_ENCODER_KEY: torch.zeros(4, 3)}, other / WEIGHTS_NAME)
    with pytest.raises(
        ValueError, match="--pretrained_lora_path .*other holds text_encoder.text_model.*U-Net's plain"
    ):
        run(pretrained_lora_path=other)
    safetensors.torch.save_file({f"{layer}.lora_A.weight": torch.zeros(4, 3)}, other / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="--pretrained_lora_path .*other: 1 weights"):
        run(pretrained_lora_path=other)
