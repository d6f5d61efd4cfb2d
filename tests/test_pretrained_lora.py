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

"""A LoRA that exists is what policy and reference start from."""

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Run
from safetensors import safe_open
from test_training import draw
from train_ncp_dpo_sd15 import KOHYA_WEIGHTS_NAME, WEIGHTS_NAME

from diffusers import DiffusionPipeline


OPTIONS = {"loss_space": "latent", "learning_rate": 3e-2, "rank": 8, "lora_alpha": 2, "max_train_steps": 4}
TEXT_ENCODER_KEY = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def first(run):
    """The script, and the folder of a LoRA that changes pictures."""
    run(**OPTIONS)
    folder = run.output_dir
    return run.into("second"), folder


def test_training_starts_from_it(first, checkpoints):
    run, folder = first
    options = {**OPTIONS, "pretrained_lora_path": folder, "learning_rate": 1e-3}
    drawing = {"validation_prompt": "a picture", "num_validation_images": 1}
    run("--run_validation", loss_type="dpo", **drawing, **options)
    # Policy and reference are one, until the policy has learnt.
    assert run.scalars("margin")[0] == 0 and run.scalars("margin")[1] != 0
    with safe_open(run.output_dir / KOHYA_WEIGHTS_NAME, framework="pt") as file:
        assert file.metadata()["ncp_pretrained_lora"] == "output"
    assert "| pretrained_lora | output |" in (run.output_dir / "README.md").read_text(encoding="utf-8")

    # The base drawn before training is the base with the first LoRA, and both LoRAs stack to what was trained.
    without = run.into("without")
    without("--run_validation", **drawing, **OPTIONS)
    before = [
        (r / "validation/step-0.png").read_bytes() for r in (run.output_dir.with_name("second"), without.output_dir)
    ]
    assert before[0] != before[1]


def test_both_stack_to_what_was_trained(first, checkpoints):
    run, folder = first
    run(pretrained_lora_path=folder, **OPTIONS)
    pipeline = DiffusionPipeline.from_pretrained(checkpoints[run.kind])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder, adapter_name="first")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(run.output_dir)
    merged = draw(pipeline)
    pipeline = DiffusionPipeline.from_pretrained(checkpoints[run.kind])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder, adapter_name="first")
    first_alone = draw(pipeline)
    pipeline.load_lora_weights(run.output_dir, adapter_name="second")
    pipeline.set_adapters(["first", "second"])
    np.testing.assert_allclose(draw(pipeline), merged, atol=1e-4)
    assert np.abs(merged - first_alone).max() > 1e-2


def test_a_lora_in_kohyas_format_is_the_same(first):
    run, folder = first
    run(pretrained_lora_path=folder, **OPTIONS)
    lora = run.lora()
    kohya = run.into("kohya")
    kohya(pretrained_lora_path=folder / KOHYA_WEIGHTS_NAME, **OPTIONS)
    for name, weight in kohya.lora().items():
        torch.testing.assert_close(weight, lora[name], rtol=0, atol=1e-4)


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
def test_what_cannot_be_merged_is_named(checkpoints, parquet, tmp_path):
    run, missing = Run("sd15", checkpoints["sd15"], parquet, tmp_path / "output"), tmp_path / "nothing"
    with pytest.raises(ValueError, match=f"--pretrained_lora_path {missing} cannot be merged: "):
        run(pretrained_lora_path=missing)

    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{layer}.lora_A.weight": torch.zeros(4, 3), f"{layer}.lora_B.weight": torch.zeros(3, 4)}
    (tmp_path / "other").mkdir()
    safetensors.torch.save_file(lora, tmp_path / "other" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="--pretrained_lora_path .*other cannot be merged: .*size mismatch"):
        run(pretrained_lora_path=tmp_path / "other")

    run(**OPTIONS)
    half = {**run.lora(), **{name.replace("attn1", "attn7"): weight for name, weight in lora.items()}}
    safetensors.torch.save_file(half, tmp_path / "other" / WEIGHTS_NAME)
    with pytest.raises(
        ValueError, match=f"cannot be merged: the U-Net has {len(half) - 2} of its {len(half)} weights"
    ):
        run.into("half")(pretrained_lora_path=tmp_path / "other")

    safetensors.torch.save_file({**lora, TEXT_ENCODER_KEY: torch.zeros(4, 3)}, tmp_path / "other" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="it holds text_encoder.text_model.* must be of a U-Net alone"):
        run(pretrained_lora_path=tmp_path / "other")
    safetensors.torch.save_file({"lora.down": torch.zeros(4, 3)}, tmp_path / "other" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="--pretrained_lora_path .*other cannot be merged: "):
        run(pretrained_lora_path=tmp_path / "other")
