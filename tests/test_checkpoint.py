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

"""The base model is looked at first: what cannot be trained is said before anything large is read, and what to do instead."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import train_ncp_dpo_sd15
import train_ncp_dpo_sdxl
from conftest import Run
from experiment import ASSETS, encode_png, to_pil
from scenes import SCENES, render
from tiny_checkpoints import copy_checkpoint, edit_json, write_parquet
from tiny_unets import sd15_unet
from transformers import CLIPTokenizer

from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    return Path(copy_checkpoint(checkpoints["sd15"], tmp_path / "sd15"))


@pytest.fixture
def sdxl(checkpoints, tmp_path):
    return Path(copy_checkpoint(checkpoints["sdxl"], tmp_path / "sdxl"))


def load_pipeline(script, checkpoint, *flags):
    words = ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_name", "none", *flags]
    accelerator = type("Accelerator", (), {"device": torch.device("cpu"), "mixed_precision": "no"})
    return script.load_pipeline(script.parse_args(words), accelerator)


@pytest.mark.bad_input
def test_an_inpainting_unet(run_sd15, checkpoint, no_models):
    edit_json(checkpoint / "unet/config.json", in_channels=9)
    with pytest.raises(ValueError, match="the U-Net takes 9 channels, as for inpainting, but the VAE gives 4"):
        run_sd15(pretrained_model_name_or_path=checkpoint)


@pytest.mark.bad_input
def test_the_checkpoint_of_the_other_script(checkpoints, parquet, tmp_path, no_models):
    for kind, other, script in [("sd15", "sdxl", "train_ncp_dpo_sdxl.py"), ("sdxl", "sd15", "train_ncp_dpo_sd15.py")]:
        with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*{script}"):
            Run(kind, checkpoints[other], parquet, tmp_path / kind)()


@pytest.mark.bad_input
def test_a_refiner(parquet, sdxl, tmp_path, no_models):
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(sdxl / part)
    with pytest.raises(ValueError, match="has no text_encoder: "):
        Run("sdxl", sdxl, parquet, tmp_path / "output")()


@pytest.mark.bad_input
def test_text_encoders_of_another_model(run_sd15, checkpoint, no_models):
    size = json.loads((checkpoint / "text_encoder/config.json").read_text())["hidden_size"]
    edit_json(checkpoint / "unet/config.json", cross_attention_dim=2 * size)
    with pytest.raises(ValueError, match=f"embeddings of width {2 * size}, but the text encoders give {size}"):
        run_sd15(pretrained_model_name_or_path=checkpoint)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
@pytest.mark.bad_input
def test_a_part_that_is_not_there(run_sd15, checkpoint, no_models, part):
    shutil.rmtree(checkpoint / part)
    with pytest.raises(ValueError, match=f"has no {part}: "):
        run_sd15(pretrained_model_name_or_path=checkpoint)


@pytest.fixture
def fp16(checkpoint, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None).to(torch.float16)
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    return tmp_path / "fp16"


@pytest.mark.bad_input
def test_files_that_exist_only_as_a_variant(run_sd15, fp16):
    for options in ({}, {"variant": "ema"}):
        with pytest.raises(ValueError, match="/fp16: .* such as fp16, give --variant"):
            run_sd15(pretrained_model_name_or_path=fp16, **options)


def test_a_variant_of_some_parts_falls_back_for_the_others(run_sd15, fp16, checkpoint):
    shutil.rmtree(fp16 / "vae")
    shutil.copytree(checkpoint / "vae", fp16 / "vae")
    validation = {"validation_prompt": "a picture", "num_validation_images": 1, "max_train_steps": 1}
    run_sd15("--run_validation", pretrained_model_name_or_path=fp16, variant="fp16", loss_space="latent", **validation)
    assert run_sd15.lora() and (run_sd15.output_dir / "validation/step-1.png").is_file()


@pytest.mark.bad_input
def test_weights_that_are_not_there(run_sd15, checkpoint):
    (checkpoint / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="/sd15: .*diffusion_pytorch_model.* in .*/vae"):
        run_sd15(pretrained_model_name_or_path=checkpoint)


def test_text_encoders_of_before_safetensors(run_sd15, checkpoint):
    path = checkpoint / "text_encoder/model.safetensors"
    torch.save(safetensors.torch.load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    run_sd15(pretrained_model_name_or_path=checkpoint, loss_space="latent", max_train_steps=1)
    assert run_sd15.lora()


def test_a_vae_of_its_own_has_no_revision_of_the_base_model(run_sd15, checkpoint, tmp_path):
    shutil.move(checkpoint / "vae", tmp_path / "vae")
    run_sd15(
        pretrained_model_name_or_path=checkpoint, revision="main", pretrained_vae_model_name_or_path=tmp_path / "vae"
    )
    assert run_sd15.lora()


@pytest.mark.bad_input
def test_a_vae_that_is_none(run_sd15, no_models, tmp_path):
    with pytest.raises(ValueError, match="--pretrained_vae_model_name_or_path .* has no vae"):
        run_sd15(pretrained_vae_model_name_or_path=tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    ],
)
@pytest.mark.bad_input
def test_schedulers_without_betas(run_sd15, checkpoint, no_models, config):
    (checkpoint / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    for loss_space in ("ncp", "latent"):
        with pytest.raises(ValueError, match=f"its {config['_class_name']} has no betas of DDPM"):
            run_sd15(pretrained_model_name_or_path=checkpoint, loss_space=loss_space)


@pytest.mark.bad_input
def test_a_prediction_that_no_loss_is_known_for(run_sd15, checkpoint, no_models):
    edit_json(checkpoint / "scheduler/scheduler_config.json", prediction_type="flow_prediction")
    for loss_space in ("ncp", "latent"):
        with pytest.raises(ValueError, match="`prediction_type` is 'flow_prediction', but must be"):
            run_sd15(pretrained_model_name_or_path=checkpoint, loss_space=loss_space)


@pytest.mark.bad_input
def test_epsilon_with_zero_terminal_snr(run_sd15, checkpoint, no_models):
    edit_json(checkpoint / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        run_sd15(pretrained_model_name_or_path=checkpoint)


@pytest.mark.parametrize("option", [{"shift_factor": 0.1}, {"latents_mean": [0.1] * 4}, {"latents_std": [2.0] * 4}])
@pytest.mark.bad_input
def test_vaes_whose_latents_are_shifted(run_sd15, checkpoint, no_models, option):
    edit_json(checkpoint / "vae/config.json", **option)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*VAE.* {next(iter(option))}"):
        run_sd15(pretrained_model_name_or_path=checkpoint)


@pytest.mark.bad_input
def test_a_vae_of_its_own_is_looked_at_too(run_sd15, checkpoint, no_models):
    edit_json(checkpoint / "vae/config.json", shift_factor=0.1)
    with pytest.raises(ValueError, match="--pretrained_vae_model_name_or_path .*/vae.* has a shift_factor"):
        run_sd15(pretrained_vae_model_name_or_path=checkpoint / "vae")
    AutoencoderTiny().save_config(checkpoint / "vae")
    with pytest.raises(ValueError, match="--pretrained_vae_model_name_or_path .*/vae.* AutoencoderTiny"):
        run_sd15(pretrained_vae_model_name_or_path=checkpoint / "vae")


@pytest.mark.bad_input
def test_a_unet_without_mid_block(run_sd15, checkpoint):
    sd15_unet(sample_size=16, mid_block_type=None).save_pretrained(checkpoint / "unet")
    with pytest.raises(ValueError, match="has no mid block: give --ncp_layer down"):
        run_sd15(pretrained_model_name_or_path=checkpoint)
    run_sd15(pretrained_model_name_or_path=checkpoint, ncp_layer="down", ncp_error_scale=1000)
    assert run_sd15.lora()


@pytest.mark.parametrize(
    "options",
    [
        {"time_cond_proj_dim": 32},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        {"num_class_embeds": 4},
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16},
        {"attention_type": "gated"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.bad_input
def test_unets_with_inputs_that_training_does_not_give(run_sd15, checkpoint, no_models, options):
    edit_json(checkpoint / "unet/config.json", **options)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .* {next(iter(options))}"):
        run_sd15(pretrained_model_name_or_path=checkpoint)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.bad_input
def test_a_base_model_that_is_not_what_its_configuration_says(run_sd15, tmp_path, caplog, prediction_type):
    # The small world's base predicts the noise.
    base = Path(copy_checkpoint(ASSETS, tmp_path / "base"))
    edit_json(base / "scheduler/scheduler_config.json", prediction_type=prediction_type)
    images = [encode_png(image) for image in to_pil(render(SCENES[:8], torch.Generator().manual_seed(0), 1.0))]
    captions = [scene.caption for scene in SCENES[:8]]
    pairs = {"jpg_0": images, "jpg_1": images[::-1], "label_0": [1.0] * 8, "caption": captions}
    options = {"dataset_name": write_parquet(tmp_path / "pairs", pairs), "resolution": 48, "loss_space": "latent"}
    run_sd15(pretrained_model_name_or_path=base, max_train_steps=1, train_batch_size=4, **options)
    warned = re.search(r"--pretrained_model_name_or_path.*`prediction_type` (\w+) in its", caplog.text)
    assert (warned and warned[1]) == (None if prediction_type == "epsilon" else prediction_type)


@pytest.mark.bad_input
def test_a_single_file(run, tmp_path, no_models):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    pipeline = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[run.kind]
    with pytest.raises(
        ValueError, match=rf"--pretrained_model_name_or_path .*model.safetensors .*{pipeline}.from_single_file"
    ):
        run(pretrained_model_name_or_path=tmp_path / "model.safetensors")


def test_a_tokenizer_that_does_not_say_how_much_is_too_much(checkpoint):
    edit_json(checkpoint / "tokenizer/tokenizer_config.json", model_max_length=...)
    assert CLIPTokenizer.from_pretrained(checkpoint / "tokenizer").model_max_length > 10**6
    pipeline = load_pipeline(train_ncp_dpo_sd15, checkpoint)
    embeddings = train_ncp_dpo_sd15.encode_prompt(pipeline, ["a cat", "word " * 200])["prompt_embeds"]
    assert embeddings.shape[:2] == (2, 77)
    # Nor is it for what validation draws.
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    assert pipeline.encode_prompt("word " * 200, **options)[0].shape[:2] == (1, 77)


def test_empty_captions_of_sdxl_are_embedded_as_its_pipeline_does(sdxl):
    for zeros in (True, False):
        edit_json(sdxl / "model_index.json", force_zeros_for_empty_prompt=zeros)
        pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
        prompt_embeds, empty_embeds, pooled_embeds, empty_pooled_embeds = pipeline.encode_prompt("a cat")
        prompt = train_ncp_dpo_sdxl.encode_prompt(load_pipeline(train_ncp_dpo_sdxl, sdxl), ["", "a cat"])
        torch.testing.assert_close(prompt["prompt_embeds"], torch.cat([empty_embeds, prompt_embeds]))
        torch.testing.assert_close(prompt["pooled_prompt_embeds"], torch.cat([empty_pooled_embeds, pooled_embeds]))
        assert prompt["prompt_embeds"][0].any() != zeros
