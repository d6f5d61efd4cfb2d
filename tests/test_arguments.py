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

"""What the flags and the environment say, and that what they cannot mean is said before any model is loaded."""

import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import train_ncp_dpo_sd15
from conftest import ROOT
from huggingface_hub.errors import HFValidationError
from train_ncp_dpo_sd15 import launch_command, parse_args


def test_help_shows_each_flag_with_its_default():
    parser = train_ncp_dpo_sd15.create_parser()
    flags = re.split(r"\n  (?=--)", parser.format_help())[1:]
    assert len(flags) == len(vars(parser.parse_args(["--pretrained_model_name_or_path", ""])))
    for flag in flags:
        assert len(flag.split()) > 3, flag
    for name in ("learning_rate", "caption_column", "ncp_error_scale"):
        assert f"(default: {parser.get_default(name)})" in " ".join(
            next(f for f in flags if f.startswith(f"--{name} ")).split()
        )
    assert "None)" not in "".join(flags)
    assert "accelerate launch train_ncp_dpo_sd15.py \\\n" in parser.format_help()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "kto"}, "argument --loss_type: invalid choice: 'kto'"),
        ({"loss_space": "pixel"}, "argument --loss_space: invalid choice: 'pixel'"),
        ({"ncp_layer": "up"}, "argument --ncp_layer: invalid choice: 'up'"),
        ({"ncp_timestep": "next"}, "argument --ncp_timestep: invalid choice: 'next'"),
        ({"image_interpolation_mode": "cubic"}, "argument --image_interpolation_mode: invalid choice: 'cubic'"),
        ({"lr_scheduler": "step"}, "argument --lr_scheduler: invalid choice: 'step'"),
        ({"lr_scheduler": "piecewise_constant"}, "argument --lr_scheduler: invalid choice: 'piecewise_constant'"),
        ({"on_bad_sample": "ignore"}, "argument --on_bad_sample: invalid choice: 'ignore'"),
        ({"report_to": "paper"}, "argument --report_to: invalid choice: 'paper'"),
        ({"rank": 0}, "argument --rank: 0, but must be at least 1"),
        ({"train_batch_size": "two"}, "argument --train_batch_size: invalid int value: 'two'"),
        ({"beta_dpo": 0}, "argument --beta_dpo: 0, but must be greater than 0"),
        ({"beta_dpo": "nan"}, "argument --beta_dpo: nan, but must be greater than 0"),
        ({"label_smoothing": 0.5}, r"argument --label_smoothing: 0.5, but must be in \[0, 0.5\)"),
        ({"ncp_probe_rms": -1}, "argument --ncp_probe_rms: -1, but must be at least 0"),
        ({"ncp_error_scale": 0}, "argument --ncp_error_scale: 0, but must be greater than 0"),
        ({"ncp_error_scale": "inf"}, "argument --ncp_error_scale: inf, but must be greater than 0"),
        ({"ncp_error_scale": "large"}, r"argument --ncp_error_scale: invalid \w+ value: 'large'"),
        ({"seed": -1}, r"argument --seed: -1, but must be from 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, r"argument --seed: 4294967296, but must be from 0 to 2\*\*32 - 1"),
    ],
)
@pytest.mark.bad_input
def test_what_one_flag_decides(run_sd15, no_models, capfd, options, message):
    with pytest.raises(SystemExit) as stop:
        run_sd15(**options)
    assert stop.value.code == 2
    assert re.search(message, capfd.readouterr().err)


@pytest.mark.parametrize(
    "flags, options, message",
    [
        ([], {"resolution": 33}, "--resolution is 33, but must be a multiple of 2"),
        ([], {"label_smoothing": 0.1, "loss_type": "ipo"}, "--label_smoothing goes with --loss_type dpo or cpo"),
        ([], {"dataset_name": None}, "exactly one of --dataset_name, --train_data_dir and --encoded_data_dir"),
        (
            [],
            {"train_data_dir": "somewhere"},
            "exactly one of --dataset_name, --train_data_dir and --encoded_data_dir",
        ),
        (
            ["--random_crop"],
            {"dataset_name": None, "encoded_data_dir": "x"},
            "--random_crop does not go with --encoded_data_dir",
        ),
        ([], {"image_1_column": "rejected"}, r"has no column 'rejected' \(--image_1_column\): there are jpg_0, jpg_1"),
        ([], {"label_column": "label"}, r"has no column 'label' \(--label_column\)"),
        ([], {"caption_column": "text"}, r"has no column 'text' \(--caption_column\)"),
        ([], {"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint: there is no checkpoint nowhere"),
        (["--run_validation"], {}, "--run_validation needs a --validation_prompt"),
        ([], {"report_to": "wandb", "hub_token": "secret"}, "--hub_token .*wandb"),
        ([], {"report_to": "comet_ml", "hub_token": "secret"}, "--hub_token"),
    ],
)
@pytest.mark.bad_input
def test_what_does_not_go_together(run_sd15, no_models, flags, options, message):
    with pytest.raises(ValueError, match=message):
        run_sd15(*flags, **options)


@pytest.mark.bad_input
def test_fp16_without_a_gpu(run_sd15, no_models, monkeypatch):
    monkeypatch.setattr(train_ncp_dpo_sd15.torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU; bf16 does not"):
        run_sd15(mixed_precision="fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU; bf16 does not"):
        run_sd15()


@pytest.mark.bad_input
def test_all_trackers_may_include_wandb(run_sd15, no_models, monkeypatch):
    monkeypatch.setattr(train_ncp_dpo_sd15, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    with pytest.raises(ValueError, match="--hub_token .*wandb"):
        run_sd15(report_to="all", hub_token="secret")


@pytest.mark.bad_input
def test_a_tracker_that_is_not_installed(run_sd15, no_models):
    # None of the suite's packages needs it.
    with pytest.raises(ImportError, match="--report_to swanlab .*`pip install swanlab`"):
        run_sd15(report_to="swanlab")


@pytest.mark.bad_input
def test_a_repository_that_cannot_be_created(run_sd15, no_models, monkeypatch):
    def create_repo(name, **kwargs):
        raise HFValidationError(f"Repo id must be in the form 'namespace/repo_name': {name}")

    monkeypatch.setattr(train_ncp_dpo_sd15, "create_repo", create_repo)
    with pytest.raises(HFValidationError, match="Repo id must be .*: a/b/c"):
        run_sd15("--push_to_hub", hub_model_id="a/b/c")


def test_no_tracker_at_all(run_sd15):
    run_sd15(report_to="none", loss_space="latent")
    assert run_sd15.lora() and not list(run_sd15.output_dir.glob("logs/*/events*"))


@pytest.mark.bad_input
def test_accumulation_of_the_environment(run_sd15, no_models, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    message = "--gradient_accumulation_steps is 1, but accelerate's configuration or environment says 3"
    with pytest.raises(ValueError, match=message):
        run_sd15()
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_sd15(gradient_accumulation_steps=3)


def test_steps_do_not_depend_on_how_their_pairs_are_split(run_sd15):
    # Steps of 8 of 12 pairs: the second step reaches into the second epoch.
    options = {"loss_space": "latent", "loss_type": "sft", "learning_rate": 0, "max_grad_norm": 1e9}
    run_sd15(train_batch_size=8, max_train_steps=3, **options)
    whole = run_sd15.scalars("grad_norm")
    run_sd15.into("accumulated")(gradient_accumulation_steps=4, max_train_steps=3, **options)
    assert run_sd15.scalars("grad_norm") == pytest.approx(whole, rel=1e-4)


def test_a_dataset_smaller_than_a_batch_trains(run_sd15):
    # 32 pairs of 2 epochs of 12 pairs: steps are rounded up.
    run_sd15(train_batch_size=16, num_train_epochs=2, max_train_steps=None, loss_space="latent")
    assert len(run_sd15.scalars("loss")) == 2 and run_sd15.state("checkpoint-2")["next_pair"] == 32


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"lr_warmup_steps": 7},
            "--lr_scheduler constant ignores --lr_warmup_steps",
        ),
        ({"lr_scheduler": "cosine"}, "--lr_warmup_steps 500 covers all steps: --learning_rate is never reached"),
        ({}, None),
    ],
)
def test_a_warm_up_that_is_none(run_sd15, caplog, options, message):
    run_sd15(loss_space="latent", max_train_steps=1, **options)
    warned = [record.getMessage() for record in caplog.records if "warm" in record.getMessage()]
    assert len(warned) == (message is not None) and all(message in text for text in warned)


@pytest.mark.parametrize("script", ["train_ncp_dpo_sd15.py", "train_ncp_dpo_sdxl.py"])
def test_help_bears_code_pages(script):
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii() and b"--encoded_data_dir" in result.stdout


NUMBER_FLAGS = [
    action.option_strings[0]
    for action in train_ncp_dpo_sd15.create_parser()._actions
    if action.type is not None or type(action.default) in (int, float)
]


@pytest.mark.bad_input
@pytest.mark.parametrize("flag", NUMBER_FLAGS)
def test_numbers_out_of_range(flag, capsys):
    for value in ("two", "nan", "inf", "-inf", "-1"):
        with pytest.raises(SystemExit) as stop:
            train_ncp_dpo_sd15.create_parser().parse_args([f"{flag}={value}"])
        assert stop.value.code == 2
        assert f"argument {flag}: " in capsys.readouterr().err


def test_number_flags_are_found():
    assert {"--max_grad_norm", "--adam_beta2", "--seed", "--lr_power", "--ncp_error_scale"} < set(NUMBER_FLAGS)


def test_the_command_that_goes_on_holds_no_secret(monkeypatch):
    words = ["--validation_prompt", "John's cat", "--hub_token", "hf_secret", "--rank", "8", "--timesteps", "1", "2"]
    words += ["--resume_from_checkpoint", "a folder/checkpoint-4", "--no_hflip", "--dataset_name", "pairs"]
    words += ["--pretrained_model_name_or_path", "model"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    args = parse_args(words)
    line = launch_command(args, SimpleNamespace(num_processes=2))
    assert "secret" not in line and line.startswith("accelerate launch --num_processes 2 train.py ")
    again = vars(parse_args(shlex.split(line)[5:]))
    assert again == {**vars(args), "hub_token": None, "resume_from_checkpoint": None}
