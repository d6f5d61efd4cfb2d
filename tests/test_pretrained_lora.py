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


def test_training_starts_from_it(first):
    run, folder = first
    for space in ("latent", "ncp"):
        options = {"loss_space": space, "learning_rate": 1e-3, "max_train_steps": 4, "pretrained_lora_path": folder}
        run.into(space)(**options)
        # Policy and reference are one, until the policy has learnt.
        assert run.scalars("margin")[0] == 0 and run.scalars("margin")[1] != 0
    with safe_open(run.output_dir / KOHYA_WEIGHTS_NAME, framework="pt") as file:
        assert file.metadata()["ncp_pretrained_lora"] == "output"
        assert file.metadata()["ss_network_dim"] == "8" and file.metadata()["ss_network_alpha"] == "2"
    assert "| pretrained_lora | output |" in (run.output_dir / "README.md").read_text(encoding="utf-8")


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
    safetensors.torch.save_file(kohya, folder.with_name("other.safetensors"))
    run(loss_space="latent", learning_rate=0, pretrained_lora_path=folder.with_name("other.safetensors"))
    written = safetensors.torch.load_file(run.output_dir / KOHYA_WEIGHTS_NAME)
    assert written.keys() == kohya.keys() and all(torch.equal(written[name], kohya[name]) for name in kohya)
    with pytest.raises(ValueError, match=r"--rank is 8, but --pretrained_lora_path .*other.safetensors has \[3, 8\]"):
        run.into("refused")(rank=8, pretrained_lora_path=folder.with_name("other.safetensors"))


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
