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

"""The scripts end to end: launched for real once each, called in this process for the rest."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import train_ncp_dpo_sd15
import train_ncp_dpo_sdxl
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker
from conftest import Run, start_script
from huggingface_hub.utils import filter_repo_objects
from ncp_loss import LOSSES, Denoising
from PIL import Image
from tiny_checkpoints import copy_checkpoint

from diffusers import DiffusionPipeline


SCRIPT_MODULES = {"sd15": train_ncp_dpo_sd15, "sdxl": train_ncp_dpo_sdxl}


def draw(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a picture", height=32, width=32, num_inference_steps=2, generator=generator, output_type="np"
    ).images


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("loss_space", ["ncp", "latent"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains_a_lora(run, checkpoints, loss_type, loss_space):
    options = {"loss_type": loss_type, "loss_space": loss_space}
    if options == {"loss_type": "dpo", "loss_space": "ncp"}:
        result = run.launch("--use_8bit_adam", **options)
        assert result.returncode == 0, result.stderr
        # Warnings of libraries about which nobody can do anything.
        assert not re.findall("torchvision|kernels|torch_dtype|No LoRA keys|bitsandbytes", result.stderr)
    else:
        # Without the launcher, which takes longer than the rest.
        run("--use_8bit_adam", **options)
    lora = run.lora()
    assert all(name.startswith("unet.") and name.endswith((".lora.down.weight", ".lora.up.weight")) for name in lora)
    assert all(weight.any() for weight in run.up_weights().values())
    if loss_type != "dpo":
        return

    pipeline = DiffusionPipeline.from_pretrained(checkpoints[run.kind], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline)
    pipeline.load_lora_weights(run.output_dir)
    assert np.abs(draw(pipeline) - before).max() > 1e-4


def test_resume_continues_the_adapter(run):
    run(max_train_steps=2, checkpointing_steps=1)
    saved = run.up_weights("checkpoint-2")
    assert equal(saved, run.up_weights())
    run(max_train_steps=4, resume_from_checkpoint="latest", checkpointing_steps=1)
    assert [f"checkpoint-{step}" for step in range(1, 5)] == sorted(
        p.name for p in run.output_dir.glob("checkpoint-*")
    )
    for name, weight in run.up_weights().items():
        assert weight.any() and not torch.equal(weight, saved[name])


def test_resume_reaches_what_an_uninterrupted_run_reaches(run_sd15):
    # 6 steps an epoch: the resume is in the middle of the second.
    run_sd15(max_train_steps=10, checkpointing_steps=8)
    uninterrupted = run_sd15.lora()
    shutil.rmtree(run_sd15.output_dir / "checkpoint-10")
    run_sd15(max_train_steps=10, resume_from_checkpoint=run_sd15.output_dir / "checkpoint-8")
    assert equal(run_sd15.lora(), uninterrupted)


def test_first_step_is_at_log_2(run):
    run()
    assert run.scalars("loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert run.scalars("implicit_accuracy")[0] == 0.5
    assert run.scalars("margin")[0] == 0
    assert run.scalars("grad_norm")[0] > 0


def test_training_learns_an_obvious_preference(run_sd15):
    options = {"learning_rate": 3e-3, "rank": 16, "beta_dpo": 50_000, "max_train_samples": 4, "max_train_steps": 60}
    run_sd15("--no_hflip", loss_space="latent", **options)
    assert np.mean(run_sd15.scalars("implicit_accuracy")[-30:]) > 0.7


def test_bf16_keeps_the_lora_in_fp32(run):
    run("--gradient_checkpointing", mixed_precision="bf16")
    assert {weight.dtype for weight in run.lora().values()} == {torch.float32}
    # Values that bf16 could not hold: the weights were not merely cast on saving.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in run.up_weights().values())


def test_gradient_checkpointing_changes_nothing(run_sd15):
    run_sd15()
    without = run_sd15.lora()
    run_sd15.output_dir = run_sd15.arguments["--output_dir"] = run_sd15.output_dir.with_name("checkpointing")
    run_sd15("--gradient_checkpointing")
    for name, weight in run_sd15.lora().items():
        torch.testing.assert_close(weight, without[name], rtol=1e-4, atol=1e-6)


def test_channels_last_changes_nothing(run_sd15):
    run_sd15()
    plain = run_sd15.scalars("loss")
    run_sd15.output_dir = run_sd15.arguments["--output_dir"] = run_sd15.output_dir.with_name("channels_last")
    run_sd15("--channels_last")
    assert run_sd15.scalars("loss") == pytest.approx(plain, rel=1e-2)


def test_compiled_blocks_train_the_adapter(run, monkeypatch):
    # Without inductor, which generates and compiles C++ for a minute. What may go wrong comes before: one block with its
    # adapter on and off, with a gradient and without, for the policy and within the encoder.
    compiled = []

    def compile_repeated_blocks(unet, options):
        compiled.append(unet)
        # Which raises if inductor has no such options.
        with torch._inductor.config.patch(options):
            compile_with(unet, backend="aot_eager")

    script = SCRIPT_MODULES[run.kind]
    compile_with = script.UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(script.UNet2DConditionModel, "compile_repeated_blocks", compile_repeated_blocks)
    options = {"max_train_steps": 3, "ncp_error_scale": 1000, "mixed_precision": "bf16"}
    run("--gradient_checkpointing", **options)
    plain = run.lora(), run.scalars("loss")
    run.output_dir = run.arguments["--output_dir"] = run.output_dir.with_name("compiled")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run("--gradient_checkpointing", "--compile", **options)
    assert len(compiled) == 1
    assert run.scalars("loss") == pytest.approx(plain[1], rel=1e-3)
    for name, weight in run.lora().items():
        torch.testing.assert_close(weight, plain[0][name], atol=1e-4, rtol=0)


def test_accumulation_equals_a_larger_batch(run_sd15):
    options = {"max_train_steps": 1, "loss_space": "latent", "lr_scheduler": "constant"}
    run_sd15("--no_hflip", train_batch_size=4, **options)
    large = run_sd15.scalars("loss"), run_sd15.scalars("grad_norm")
    run_sd15.output_dir = run_sd15.arguments["--output_dir"] = run_sd15.output_dir.with_name("accumulated")
    run_sd15("--no_hflip", train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert run_sd15.scalars("loss") == pytest.approx(large[0], rel=1e-5)
    assert run_sd15.scalars("grad_norm") == pytest.approx(large[1], rel=1e-4)


def test_v_prediction(checkpoints, parquet, tmp_path):
    run = Run("sd15", checkpoints["sd2"], parquet, tmp_path / "output")()
    assert run.scalars("loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(weight.any() for weight in run.up_weights().values())


@pytest.mark.parametrize("loss_type", [name for name, loss in LOSSES.items() if not loss.needs_reference])
@pytest.mark.parametrize("loss_space", ["ncp", "latent"])
def test_reference_free_losses_run_no_reference(run_sd15, monkeypatch, loss_type, loss_space):
    predictions, predict = [], Denoising.predict

    def record(*args):
        predictions.append(None)
        return predict(*args)

    monkeypatch.setattr(Denoising, "predict", record)
    run_sd15(loss_type=loss_type, loss_space=loss_space, ncp_error_scale=1000)
    assert len(predictions) == 3  # one is of `check_prediction`
    run_sd15.into("dpo")(loss_type="dpo", loss_space=loss_space, ncp_error_scale=1000)
    assert len(predictions) == 3 + 5


def test_error_scale_is_measured_once_and_reproduces(run_sd15):
    run_sd15(checkpointing_steps=2, ncp_error_scale="auto")
    state = json.loads((run_sd15.output_dir / "checkpoint-2/training_state.json").read_text())
    assert state["error_scale"] > 100
    measured = run_sd15.lora()
    assert f"| error_scale | {state['error_scale']} |" in (run_sd15.output_dir / "README.md").read_text()

    run_sd15.output_dir = run_sd15.arguments["--output_dir"] = run_sd15.output_dir.with_name("given")
    run_sd15(ncp_error_scale=state["error_scale"])
    assert equal(run_sd15.lora(), measured)


def test_resume_does_not_measure_again(run_sd15, monkeypatch):
    run_sd15(checkpointing_steps=2, ncp_error_scale="auto")

    def refuse(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(train_ncp_dpo_sd15, "measure_error_scale", refuse)
    run_sd15(max_train_steps=3, resume_from_checkpoint="latest", ncp_error_scale="auto")


def test_checkpoints_total_limit(run_sd15):
    run_sd15(max_train_steps=12, checkpointing_steps=3, checkpoints_total_limit=2, loss_space="latent")
    assert {path.name for path in run_sd15.output_dir.glob("*checkpoint*")} == {"checkpoint-9", "checkpoint-12"}


def test_a_new_run_does_not_touch_another_ones_checkpoints(run_sd15):
    run_sd15(checkpointing_steps=2, loss_space="latent")
    with pytest.raises(ValueError, match="--output_dir .* holds checkpoint-2 of another run"):
        run_sd15(loss_space="latent")


def test_validation_images_share_their_noise(run):
    run(
        "--run_validation",
        validation_prompt="a picture",
        num_validation_images=2,
        validation_steps=1,
        loss_space="latent",
        learning_rate=0,
    )
    images = [np.asarray(Image.open(run.output_dir / f"validation/step-{step}.png")) for step in range(3)]
    assert images[0].shape == (32, 64, 3)
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0][:, :32], images[0][:, 32:])
    before_after = np.asarray(Image.open(run.output_dir / "validation/before_after.png"))
    assert before_after.shape == (64, 64, 3)
    # Both rows have a title at their top.
    assert np.array_equal(before_after[16:32], images[0][16:]) and np.array_equal(before_after[48:], images[0][16:])
    assert not np.array_equal(before_after[:16], images[0][:16]) and not np.array_equal(
        before_after[:32], before_after[32:]
    )
    assert "validation/before_after.png" in (run.output_dir / "README.md").read_text()


def test_the_resolution_is_by_default_that_of_the_unet(run, caplog):
    caplog.set_level("INFO")
    run(loss_space="latent", resolution=None, max_train_steps=1)
    assert run.state("checkpoint-1")["arguments"]["resolution"] == 32 and "--resolution 32" in caplog.text


def test_encoded_pairs_have_a_resolution(run_sd15, tmp_path):
    (tmp_path / "encoding.json").write_text('{"resolution": 24}')
    options = {"--resolution": None, "--dataset_name": None, "--encoded_data_dir": tmp_path}
    args = train_ncp_dpo_sd15.parse_args(run_sd15.command([], options))
    PartialState()  # what the scripts log through
    train_ncp_dpo_sd15.check_checkpoint(args)
    assert args.resolution == 24


def test_the_progress_bar_shows_means(run_sd15, capsys):
    run_sd15(loss_space="latent", max_train_steps=4)
    shown = float(re.findall(r"loss=([\d.e+-]+)", capsys.readouterr().err)[-1])
    assert shown == pytest.approx(np.mean(run_sd15.scalars("loss")), rel=1e-3)


@pytest.mark.bad_input
def test_a_mistake_is_answered_in_one_line(run_sd15, tmp_path):
    log = tmp_path / "log"
    process = start_script("train_ncp_dpo_sd15.py", run_sd15.command([], {"--dataset_name": tmp_path / "none"}), log)
    process.join(120)
    lines = log.read_text().splitlines()
    assert process.exitcode == 2 and [line for line in lines if "--dataset_name" in line] == lines[-1:]
    assert lines[-1].startswith("train_ncp_dpo_sd15.py: error: ") and "Traceback" not in log.read_text()


def test_validation_shows_the_policy(run_sd15):
    options = {"validation_prompt": "a picture", "num_validation_images": 1, "loss_space": "latent"}
    # An earlier run has left it.
    (run_sd15.output_dir / "validation").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(run_sd15.output_dir / "validation/step-0.png")
    run_sd15("--run_validation", **options)
    files = [run_sd15.output_dir / f"validation/step-{step}.png" for step in (0, 2)]
    first, last = map(Image.open, files)
    assert first.size == last.size and not np.array_equal(first, last)
    # The base is not drawn again.
    drawn = files[0].stat().st_mtime_ns
    run_sd15("--run_validation", max_train_steps=3, resume_from_checkpoint="latest", **options)
    assert files[0].stat().st_mtime_ns == drawn and Image.open(files[1].with_name("step-3.png"))


def test_push_to_hub(run_sd15, tmp_path, monkeypatch, caplog):
    created, uploads = [], []

    class Repository:
        repo_id = "somebody/output"

    def create_repo(name, **kwargs):
        created.append((name, kwargs))
        return Repository

    monkeypatch.setattr(train_ncp_dpo_sd15, "create_repo", create_repo)
    monkeypatch.setattr(train_ncp_dpo_sd15, "upload_folder", lambda **kwargs: uploads.append(kwargs))
    monkeypatch.setattr(train_ncp_dpo_sd15, "file_exists", lambda name, file, token: True)
    run_sd15.output_dir.mkdir()
    (run_sd15.output_dir / "diary.txt").write_text("nobody's business")
    options = {"validation_prompt": "a picture", "num_validation_images": 1, "hub_token": "hf_secret"}
    run_sd15("--push_to_hub", "--hub_private_repo", "--run_validation", loss_space="latent", **options)
    assert created == [("output", {"private": True, "exist_ok": True, "token": "hf_secret"})]
    (upload,) = uploads
    assert upload["repo_id"] == "somebody/output" and upload["folder_path"] == str(run_sd15.output_dir)
    files = [str(path.relative_to(run_sd15.output_dir)) for path in run_sd15.output_dir.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=upload["allow_patterns"]))
    assert {"pytorch_lora_weights.safetensors", "README.md", "validation/before_after.png"} <= sent
    logs = [run_sd15.output_dir / file for file in sent if file.startswith("logs/")]
    assert logs and not any(str(tmp_path).encode() in log.read_bytes() for log in logs)
    assert "--hub_model_id somebody/output holds a LoRA already" in caplog.text
    assert not any(file.startswith(("checkpoint-", "diary")) for file in sent)
    assert 'load_lora_weights("somebody/output")' in (run_sd15.output_dir / "README.md").read_text(encoding="utf-8")


def test_an_upload_that_fails(run_sd15, monkeypatch):
    def upload_folder(**kwargs):
        raise ConnectionError("the hub does not answer")

    monkeypatch.setattr(train_ncp_dpo_sd15, "create_repo", lambda name, **kwargs: SimpleNamespace(repo_id="me/lora"))
    monkeypatch.setattr(train_ncp_dpo_sd15, "file_exists", lambda name, file, token: False)
    monkeypatch.setattr(train_ncp_dpo_sd15, "upload_folder", upload_folder)
    with pytest.raises(RuntimeError, match="--push_to_hub .*the hub does not answer") as failure:
        run_sd15("--push_to_hub", loss_space="latent")
    assert f"hf upload me/lora {run_sd15.output_dir} . --include" in str(failure.value)
    assert run_sd15.lora()


def test_a_tracker_that_fails_is_a_warning(run_sd15, monkeypatch, caplog):
    def log(self, values, step=None, **options):
        raise ConnectionError(f"step {step} is refused")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    monkeypatch.setattr(TensorBoardTracker, "log_images", log)
    options = {"validation_prompt": "a picture", "num_validation_images": 1, "num_eval_pairs": 2}
    run_sd15("--run_validation", loss_space="latent", **options)
    assert {"0", "1", "2"} == set(re.findall(r"--report_to tensorboard failed: step (\d) is refused", caplog.text))
    assert run_sd15.lora() and (run_sd15.output_dir / "eval.csv").is_file()


@pytest.mark.bad_input
def test_pictures_that_are_not_finite_are_not_saved(run_sd15, checkpoints, tmp_path, caplog):
    base = Path(copy_checkpoint(checkpoints["sd15"], tmp_path / "nan"))
    (file,) = (base / "vae").glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    weights["post_quant_conv.bias"][:] = math.nan
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    options = {"validation_prompt": "a cat", "num_validation_images": 2, "loss_space": "latent"}
    run_sd15("--run_validation", pretrained_model_name_or_path=base, **options)
    assert "--validation_prompt 'a cat' with --mixed_precision no" in caplog.text
    assert not (run_sd15.output_dir / "validation").exists()
    assert run_sd15.lora()


def test_files_are_as_readable_as_the_umask_says(run_sd15):
    before = os.umask(0o027)
    try:
        run_sd15(loss_space="latent")
    finally:
        os.umask(before)
    files = list(run_sd15.output_dir.rglob("*.safetensors"))
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_the_card_tells_nothing_of_this_machine(run_sd15, tmp_path):
    run_sd15(loss_space="latent")
    card = (run_sd15.output_dir / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in card and str(tmp_path) not in card
    assert "A LoRA for `sd15`, trained by dpo in latent space on the preference pairs of `parquet`" in card


def test_8bit_adam_without_bitsandbytes(run_sd15, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="bitsandbytes"):
        run_sd15("--use_8bit_adam")


def test_a_norm_of_0_clips_nothing(run_sd15):
    options = {"loss_type": "sft", "loss_space": "latent", "learning_rate": 1e-3}
    run_sd15(max_grad_norm=0, **options)
    unclipped = run_sd15.up_weights()
    run_sd15.into("large")(max_grad_norm=1e9, **options)
    assert all(torch.equal(weight, unclipped[name]) for name, weight in run_sd15.into("large").up_weights().items())


def test_non_finite_loss_stops_the_run(run_sd15, monkeypatch):
    calls = []

    def latent_error(model_pred, target):  # twice a step, and twice before the first
        calls.append(1)
        return (model_pred - target).square().mean(dim=(1, 2, 3)) * (math.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(train_ncp_dpo_sd15.ncp_loss, "latent_error", latent_error)
    with pytest.raises(RuntimeError, match=r"Step 4 is not finite: loss nan, .* rows \[\d+, \d+\]"):
        run_sd15(loss_space="latent", max_train_steps=6, checkpointing_steps=3)
    assert all(weight.isfinite().all() for weight in run_sd15.lora("checkpoint-3").values())
    assert not (run_sd15.output_dir / "pytorch_lora_weights.safetensors").exists()


def test_fixed_vae_runs_in_half_precision(checkpoints, parquet, tmp_path, monkeypatch):
    dtypes = []
    encode_images = train_ncp_dpo_sdxl.encode_images

    def spy(vae, *args):
        dtypes.append(vae.dtype)
        return encode_images(vae, *args)

    monkeypatch.setattr(train_ncp_dpo_sdxl, "encode_images", spy)
    options = {"mixed_precision": "bf16", "loss_space": "latent", "max_train_steps": 1}
    Run("sdxl", checkpoints["sdxl"], parquet, tmp_path / "own")(**options)
    Run("sdxl", checkpoints["sdxl"], parquet, tmp_path / "fixed")(
        **options, pretrained_vae_model_name_or_path=checkpoints["sdxl"] + "/vae"
    )
    # `check_prediction` and the step.
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
