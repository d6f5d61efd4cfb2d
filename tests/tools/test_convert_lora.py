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

"""A LoRA in kohya's format has the names that ComfyUI maps, and does what it does in Diffusers."""

import convert_lora
import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from tiny_unets import LORA_TARGETS, sd15_unet
from train_ncp_dpo_sd15 import KOHYA_WEIGHTS_NAME, save_kohya_lora

from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers


PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
# The U-Nets of the real models. Depths are those of ComfyUI's configurations: transformers per layer, down and up, and in the middle.
REAL = {
    "sd15": {
        "config": {
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "depths": [1, 1, 1, 0],
        "version": ("sd_v1", "False"),
    },
    "sd2": {
        "config": {
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "depths": [1, 1, 1, 0],
        "version": ("sd_v2", "True"),
    },
    "sdxl": {
        "config": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "depths": [0, 2, 10],
        "version": ("sdxl_base_v1-0", "False"),
    },
}


def comfy_key_map(depths):
    """
    The attention layers of ComfyUI's key map: the name of a LoRA's layer, and the layer of the original U-Net that it means.

    The original numbers its blocks through: down, each level has two layers and a downsampler, after the first convolution; up, each
    has three layers, the upsampler within the last one. A layer is a resnet, .0, and where it has one a transformer, .1. The
    names are `lora_unet_` and diffusers' path of the layer, with underscores.
    """
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    places = {("mid_block.attentions.0", "middle_block.1"): depths[-1] or 1}
    for level, depth in enumerate(depths):
        for index in range(2):
            places[f"down_blocks.{level}.attentions.{index}", f"input_blocks.{1 + 3 * level + index}.1"] = depth
    for level, depth in enumerate(reversed(depths)):
        for index in range(3):
            places[f"up_blocks.{level}.attentions.{index}", f"output_blocks.{3 * level + index}.1"] = depth
    return {
        f"lora_unet_{path}.{block}".replace(".", "_"): f"diffusion_model.{original}.{block}"
        for (path, original), depth in places.items()
        for block in (
            f"transformer_blocks.{number}.attn{attention}.{layer}"
            for number in range(depth)
            for attention in (1, 2)
            for layer in layers
        )
    }


@pytest.mark.parametrize("model", list(REAL))
def test_every_layer_of_a_real_unet_is_one_that_comfyui_maps(model, tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**REAL[model]["config"])
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS))
    lora = {f"unet.{name}": torch.zeros(weight.shape) for name, weight in get_peft_model_state_dict(unet).items()}
    alphas = {name.removeprefix("unet.").removesuffix(".lora_A.weight"): 4 for name in lora if "lora_A" in name}
    metadata = save_kohya_lora(tmp_path / KOHYA_WEIGHTS_NAME, lora, alphas, {})
    kohya = safetensors.torch.load_file(tmp_path / KOHYA_WEIGHTS_NAME)
    parts = {}
    for name, value in kohya.items():
        layer, _, part = name.partition(".")
        parts.setdefault(layer, {})[part] = value
    key_map = comfy_key_map(REAL[model]["depths"])
    assert parts.keys() == key_map.keys()
    assert len(set(key_map.values())) == len(key_map) == len(lora) // 2

    # What a name means has the shape of what was trained: a wrong block would have another width or depth.
    originals = dict(unet.named_modules())
    for layer, tensors in parts.items():
        assert tensors.keys() == set(PARTS)
        assert tensors["alpha"].item() == 4 and tensors["alpha"].shape == ()
    for name, module in originals.items():
        if hasattr(module, "lora_A"):
            tensors = parts["lora_unet_" + name.replace(".", "_")]
            assert tensors["lora_down.weight"].shape == (4, module.in_features)
            assert tensors["lora_up.weight"].shape == (module.out_features, 4)
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == REAL[model]["version"]


def convert(folder, **options):
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    convert_lora.main(convert_lora.parse_args(["--lora_weights", str(folder), *words]))
    return folder / KOHYA_WEIGHTS_NAME


def read_metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


OPTIONS = {"rank": 8, "lora_alpha": 2, "learning_rate": 3e-2, "loss_space": "latent"}


@pytest.fixture
def trained(run):
    """A run whose alpha is not its rank, and that changes the pictures."""
    run(max_train_steps=4, **OPTIONS)
    (run.output_dir / KOHYA_WEIGHTS_NAME).unlink()
    return run


def load_pipeline(checkpoint):
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline):
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return pipeline("a picture", generator=torch.Generator().manual_seed(0), **options).images


def test_it_draws_the_same_pictures_with_the_same_weights(trained, checkpoints):
    file = convert(trained.output_dir)
    pipeline = load_pipeline(checkpoints[trained.kind])
    before, base = draw(pipeline), {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    # The folder is still that of Diffusers' file.
    pipeline.load_lora_weights(trained.output_dir)
    expected = draw(pipeline)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    assert np.abs(expected - before).max() > 1e-2
    np.testing.assert_allclose(draw(pipeline), expected, atol=1e-6)
    pipeline.unload_lora_weights()

    pipeline.load_lora_weights(trained.output_dir)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused, kohya, num_merged = pipeline.unet.state_dict(), safetensors.torch.load_file(file), 0
    for name, weight in base.items():
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{layer}.alpha" in kohya:
            # As every other program merges it.
            down, up, alpha = (kohya[f"{layer}.{part}"] for part in PARTS)
            weight = weight + alpha / len(down) * (up @ down)
            num_merged += 1
        torch.testing.assert_close(fused[name], weight, rtol=0, atol=1e-6)
    assert 3 * num_merged == len(kohya)


def test_metadata_say_what_was_trained(trained, checkpoints, capsys):
    metadata = read_metadata(convert(trained.output_dir))
    assert metadata["ss_network_dim"] == "8" and metadata["ss_network_alpha"] == "2"
    assert metadata["ncp_loss"] == "dpo in latent space" and metadata["ncp_beta_dpo"] == "5000"
    assert metadata["ss_steps"] == "4"
    # Nobody is told where things lie on this machine.
    assert metadata["ss_sd_model_name"] == trained.kind and metadata["ncp_dataset"] == "parquet"
    assert not any("/" in value for value in metadata.values())
    assert "rank 8, alpha 2" in capsys.readouterr().out


def test_the_trainer_writes_the_same(run):
    run(max_train_steps=1, **OPTIONS)
    converted = run.output_dir / "converted.safetensors"
    convert(run.output_dir, output_file=converted)
    written = run.output_dir / KOHYA_WEIGHTS_NAME
    assert read_metadata(converted) == read_metadata(written)
    tensors = safetensors.torch.load_file(converted)
    assert all(torch.equal(value, tensors.pop(name)) for name, value in safetensors.torch.load_file(written).items())
    assert not tensors


def test_metadata_are_of_the_checkpoint_that_is_converted(trained, capsys):
    trained(max_train_steps=5, resume_from_checkpoint="latest", **OPTIONS)
    (trained.output_dir / KOHYA_WEIGHTS_NAME).unlink()
    step_4 = trained.output_dir / "checkpoint-4"
    assert read_metadata(convert(step_4))["ss_steps"] == "4"
    assert read_metadata(convert(trained.output_dir))["ss_steps"] == "5"


def save_lora(folder, **options):
    """A LoRA of a tiny U-Net with random weights, as Diffusers saves it, and the U-Net."""
    unet = sd15_unet()
    unet.add_adapter(LoraConfig(target_modules=LORA_TARGETS, **options))
    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    config = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=lora, unet_lora_adapter_metadata=config)
    return unet


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alphas_are_the_layers_own(tmp_path, use_rslora):
    patterns = {"rank_pattern": {"attn1.to_q": 6}, "alpha_pattern": {"attn1.to_q": 3, r"mid_block.*\.to_k": 5}}
    unet = save_lora(tmp_path, r=4, lora_alpha=2, use_rslora=use_rslora, **patterns)
    kohya = safetensors.torch.load_file(convert(tmp_path))
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    for name, module in layers.items():
        layer = "lora_unet_" + name.replace(".", "_")
        scale = kohya[f"{layer}.alpha"].item() / len(kohya[f"{layer}.lora_down.weight"])
        assert scale == pytest.approx(module.scaling["default"], rel=1e-6)
    metadata = read_metadata(tmp_path / KOHYA_WEIGHTS_NAME)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


def test_alpha_is_the_rank_where_the_file_does_not_say(tmp_path, capsys):
    save_lora(tmp_path, r=4, lora_alpha=2)
    lora = safetensors.torch.load_file(tmp_path / "pytorch_lora_weights.safetensors")
    safetensors.torch.save_file(lora, tmp_path / "older.safetensors")
    convert(tmp_path / "older.safetensors")
    output = capsys.readouterr().out
    assert "rank 4, alpha 4" in output and "no alphas" in output and "No checkpoint" in output
    metadata = read_metadata(tmp_path / "older_kohya.safetensors")
    assert metadata["ss_network_alpha"] == "4" and "ncp_loss" not in metadata and "ss_sd_model_name" not in metadata


def test_alphas_that_the_file_has_as_tensors(tmp_path, capsys):
    save_lora(tmp_path, r=4)
    lora = safetensors.torch.load_file(tmp_path / "pytorch_lora_weights.safetensors")
    layers = [name.removesuffix(".lora.down.weight") for name in lora if name.endswith("down.weight")]
    # The last layer has none, so its alpha is its rank.
    alphas = {layer: float(index) for index, layer in enumerate(layers[:-1])}
    lora |= {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in alphas.items()}
    safetensors.torch.save_file(lora, tmp_path / "alphas.safetensors")
    convert(tmp_path / "alphas.safetensors")
    kohya = safetensors.torch.load_file(tmp_path / "alphas_kohya.safetensors")
    for layer in layers:
        name = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        assert kohya[f"{name}.alpha"].item() == alphas.get(layer, 4)
    assert "rank 4, alpha Dynamic" in capsys.readouterr().out


def test_names_of_before_peft_are_converted_too(tmp_path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    lora = {f"unet.{layer}.processor.to_out_lora.{side}.weight": torch.zeros(4, 4) for side in ("down", "up")}
    name = "lora_unet_" + f"{layer}.to_out.0".replace(".", "_")
    safetensors.torch.save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    assert safetensors.torch.load_file(convert(tmp_path)).keys() == {f"{name}.{part}" for part in PARTS}


UNET_KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        # DoRA
        f"{UNET_KEY}_magnitude_vector",
        f"{UNET_KEY.removesuffix('.lora')}.dora_scale",
        "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "unet.mid_block.attentions.0.proj_in.alpha",
    ],
)
@pytest.mark.bad_input
def test_what_cannot_be_converted_is_named(tmp_path, key):
    file = tmp_path / "lora.safetensors"
    tensors = {f"{UNET_KEY}.{side}.weight": torch.zeros(4, 4) for side in ("down", "up")}
    safetensors.torch.save_file({**tensors, key: torch.zeros(() if key.endswith("alpha") else (4, 4))}, file)
    with pytest.raises(ValueError, match=f"--lora_weights {file}") as error:
        convert(file)
    assert key.removesuffix(".alpha") in str(error.value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.bad_input
def test_half_a_pair_is_named(tmp_path):
    file = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({f"{UNET_KEY}.down.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(ValueError, match=f"{file}: .*attn1.to_q .*lora.down.weight.*lora.up.weight"):
        convert(file)


@pytest.mark.bad_input
def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"--lora_weights: .*{tmp_path}/pytorch_lora_weights"):
        convert(tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"--lora_weights {broken} "):
        convert(broken)
    save_lora(tmp_path)
    file = convert(tmp_path)
    with pytest.raises(ValueError, match=f"--output_file {file} "):
        convert(tmp_path)
    convert(tmp_path, output_file=tmp_path / "other/name.safetensors")
    assert (tmp_path / "other/name.safetensors").is_file()
