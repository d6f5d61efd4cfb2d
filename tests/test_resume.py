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

"""A run that is cut off ends where it would have ended; what would change it silently is refused."""

import errno
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_ncp_dpo_sd15
from accelerate.state import PartialState
from conftest import ROOT, Run, deviation, run_on_two_processes, start_script
from datasets import Dataset
from experiment import ASSETS, encode_png, to_pil
from scenes import SCENES, render
from tiny_checkpoints import pair_columns, write_parquet

from diffusers import AutoencoderKL
from diffusers.loaders import lora_base


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "flags, options",
    [
        (["--use_8bit_adam"], {"rank": 64}),
        ([], {"gradient_accumulation_steps": 2}),
        (["--random_crop"], {"dataloader_num_workers": 2}),
        ([], {"loss_space": "ncp", "ncp_error_scale": "auto"}),
        ([], {"lr_scheduler": "cosine", "lr_warmup_steps": 3}),
    ],
)
def test_resume_is_exact(run_sd15, flags, options):
    # 6 batches an epoch: both checkpoints lie within one, the later within the second.
    options = {"loss_space": "latent", "max_train_steps": 9, **options}
    run_sd15(*flags, checkpointing_steps=4, **options)
    uninterrupted = run_sd15.lora()
    for step in (8, 4):
        shutil.rmtree(run_sd15.output_dir / "checkpoint-9")
        run_sd15(*flags, resume_from_checkpoint=f"checkpoint-{step}", **options)
        assert equal(run_sd15.lora(), uninterrupted)
        shutil.rmtree(run_sd15.output_dir / f"checkpoint-{step}")


def start(run, *flags, **options):
    """A run in a process of its own that leads a process group, and where its output goes."""
    options = {"loss_space": "latent", "max_train_steps": 40, "checkpointing_steps": 5, **options}
    words = run.command(flags, {f"--{name}": value for name, value in options.items()})
    log = run.output_dir.with_name("log")
    return start_script("train_ncp_dpo_sd15.py", words, log), log


def wait_for(condition, process):
    while not condition():
        assert process.exitcode is None, "the run ended first"
        time.sleep(0.01)


def exit_code(process):
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(checkpoints, parquet, tmp_path_factory):
    run = Run("sd15", checkpoints["sd15"], parquet, tmp_path_factory.mktemp("uninterrupted") / "output")
    process, log = start(run)
    assert exit_code(process) == 0, log.read_text()
    return run.lora()


@pytest.mark.parametrize(
    "sign", ["checkpoint-5", "incomplete-checkpoint-10", "incomplete-checkpoint-10/optimizer.bin"]
)
def test_killed_runs_end_right(run_sd15, uninterrupted, sign):
    process, log = start(run_sd15)
    # What is incomplete is not so for long: if it was missed, the kill comes right after saving.
    signs = [run_sd15.output_dir / sign, run_sd15.output_dir / "checkpoint-10"]
    wait_for(lambda: any(path.exists() for path in signs), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert not (run_sd15.output_dir / "pytorch_lora_weights.safetensors").exists()
    process, log = start(run_sd15, resume_from_checkpoint="latest")
    assert exit_code(process) == 0, log.read_text()
    assert re.search(r"Resumed from .*checkpoint-\d+", log.read_text())
    assert equal(run_sd15.lora(), uninterrupted)


def test_a_terminals_interrupt_saves_a_checkpoint(run_sd15):
    process, log = start(
        run_sd15, max_train_steps=4000, checkpointing_steps=4000, dataloader_num_workers=1, hub_token="hf_secret"
    )
    wait_for(lambda: re.search(r" ([3-9]|\d\d+)/4000", log.read_text()), process)
    # To the whole group, with the processes that load images.
    os.killpg(process.pid, signal.SIGINT)
    assert exit_code(process) == 128 + signal.SIGINT
    assert "--resume_from_checkpoint latest" in log.read_text()
    assert "secret" not in log.read_text()
    (checkpoint,) = run_sd15.output_dir.glob("*checkpoint-*")
    options = {"loss_space": "latent", "max_train_steps": run_sd15.state(checkpoint.name)["global_step"] + 2}
    run_sd15(resume_from_checkpoint="latest", **options)
    resumed = run_sd15.lora()
    run_sd15.into("uninterrupted")(**options)
    assert equal(resumed, run_sd15.lora())


@pytest.mark.bad_input
def test_a_folder_that_another_run_writes_to(run_sd15, tmp_path):
    process, log = start(run_sd15, max_train_steps=2000)
    wait_for(lambda: re.search(r" \d+/2000", log.read_text()), process)
    other = start_script("train_ncp_dpo_sd15.py", run_sd15.command([], {"--seed": 1}), tmp_path / "other")
    assert exit_code(other) == 2
    assert f"--output_dir {run_sd15.output_dir}" in (tmp_path / "other").read_text()
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process) == 143
    (checkpoint,) = sorted(run_sd15.output_dir.glob("*checkpoint-*"))[-1:]
    assert run_sd15.state(checkpoint.name)["arguments"]["seed"] == 0


def test_each_step_is_logged_once(run_sd15):
    options = {"loss_space": "latent", "num_eval_pairs": 2, "validation_steps": 2, "checkpointing_steps": 2}
    run_sd15(max_train_steps=5, **options)
    shutil.rmtree(run_sd15.output_dir / "checkpoint-5")
    shutil.rmtree(run_sd15.output_dir / "checkpoint-4")
    run_sd15(max_train_steps=6, resume_from_checkpoint="checkpoint-2", **options)
    assert len(run_sd15.scalars("loss")) == 6
    # At steps 0, 2, 4 and 6; the one at 5 is not repeated.
    assert len(run_sd15.scalars("eval/latent/loss/all")) == 4
    assert {line.split(",")[0] for line in (run_sd15.output_dir / "eval.csv").read_text().splitlines()[1:]} == set(
        "0246"
    )


def test_latest_passes_over_what_is_not_complete(run_sd15, caplog):
    run_sd15(checkpointing_steps=1, loss_space="latent")
    (run_sd15.output_dir / "incomplete-checkpoint-7").mkdir()
    (run_sd15.output_dir / "checkpoint-2/training_state.json").unlink()
    options = {"max_train_steps": 3, "checkpointing_steps": 1, "loss_space": "latent"}
    run_sd15(resume_from_checkpoint="latest", **options)
    assert "checkpoint-2 is no complete checkpoint and is passed over" in caplog.text
    assert "incomplete-checkpoint-7 is no complete checkpoint" in caplog.text
    # A whole one has its name now, and nothing of it is removed.
    assert (run_sd15.output_dir / "checkpoint-2/training_state.json").is_file()
    assert (run_sd15.output_dir / "passed-over-checkpoint-2/pytorch_lora_weights.safetensors").is_file()


def test_latest_of_nothing_starts_anew(run_sd15):
    run_sd15(resume_from_checkpoint="latest", loss_space="latent")
    assert run_sd15.lora()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 8}, "--rank is 8, but was 4"),
        ({"loss_type": "ipo"}, "--loss_type is 'ipo', but was 'dpo'"),
        ({"loss_space": "ncp"}, "--loss_space is 'ncp', but was 'latent'"),
        ({"seed": 1}, "--seed is 1, but was 0"),
        ({"resolution": 16}, "--resolution is 16, but was 32"),
        ({"learning_rate": 1}, "--learning_rate is 1.0, but was 0.001"),
    ],
)
@pytest.mark.bad_input
def test_resume_refuses_changes(run_sd15, options, message):
    run_sd15(checkpointing_steps=2, loss_space="latent")
    with pytest.raises(ValueError, match=message):
        run_sd15(**{"loss_space": "latent", "resume_from_checkpoint": "latest", **options})


@pytest.mark.bad_input
def test_resume_refuses_another_model(run_sd15, checkpoints):
    run_sd15(checkpointing_steps=2, loss_space="latent")
    options = {"loss_space": "latent", "pretrained_model_name_or_path": checkpoints["sd2"]}
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path is '.*sd2', but was '.*sd15'"):
        run_sd15(resume_from_checkpoint="latest", **options)


@pytest.mark.parametrize("change", ["caption", "label", "length", "place"])
@pytest.mark.bad_input
def test_resume_refuses_other_data(run_sd15, tmp_path, caplog, change):
    run_sd15(loss_space="latent")
    columns = pair_columns(13 if change == "length" else 12)
    if change == "caption":
        columns["caption"][3] = "another"
    elif change == "label":
        columns["label_0"][3] = 1 - columns["label_0"][3]
    options = {
        "dataset_name": write_parquet(tmp_path / "other", columns),
        "loss_space": "latent",
        "max_train_steps": 3,
    }
    if change == "place":
        # The same pairs in another folder are the same data.
        run_sd15(resume_from_checkpoint="latest", **options)
        return
    message = f"the data are {13 if change == 'length' else 12} pairs, but were 12 others in .*checkpoint-2"
    with pytest.raises(ValueError, match=message):
        run_sd15(resume_from_checkpoint="latest", **options)
    run_sd15("--allow_resume_changes", resume_from_checkpoint="latest", **options)
    assert re.search(message, caplog.text)


@pytest.mark.bad_input
def test_resume_refuses_fewer_steps_than_there_are(run_sd15):
    run_sd15(max_train_steps=3, loss_space="latent")
    with pytest.raises(ValueError, match="--max_train_steps is 2, but .*checkpoint-3 is further on"):
        run_sd15(max_train_steps=2, loss_space="latent", resume_from_checkpoint="checkpoint-3/")
    assert "| max_train_steps | 3 |" in (run_sd15.output_dir / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_from_before_a_flag_was_trained_with_its_default(run_sd15):
    run_sd15(loss_space="latent", ncp_layer="mid")
    run_sd15.edit_state("checkpoint-2", lambda state: state["arguments"].pop("label_smoothing"))
    run_sd15.edit_state("checkpoint-2", lambda state: state.pop("data"))
    options = {"loss_space": "latent", "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="--label_smoothing is 0.1, but was 0.0"):
        run_sd15(label_smoothing=0.1, **options)
    run_sd15(**options)
    assert (run_sd15.output_dir / "checkpoint-3").is_dir()


def test_an_error_scale_from_before_a_flag_is_kept(run_sd15, monkeypatch):
    def refuse(*args):
        raise AssertionError("measured again")

    run_sd15(ncp_error_scale="auto")
    run_sd15.edit_state("checkpoint-2", lambda state: state["arguments"].pop("ncp_timestep"))
    monkeypatch.setattr(train_ncp_dpo_sd15, "measure_error_scale", refuse)
    run_sd15(max_train_steps=3, resume_from_checkpoint="latest", ncp_error_scale="auto")
    assert run_sd15.state("checkpoint-3")["error_scale"] == run_sd15.state("checkpoint-2")["error_scale"]


def test_a_finished_run_goes_on(run_sd15):
    run_sd15(max_train_steps=4, loss_space="latent")
    uninterrupted = run_sd15.lora()
    run_sd15.into("in_parts")(max_train_steps=2, loss_space="latent")
    run_sd15(max_train_steps=4, loss_space="latent", resume_from_checkpoint="latest")
    assert equal(run_sd15.lora(), uninterrupted)


@pytest.mark.bad_input
def test_a_readme_of_the_user_is_not_replaced(run_sd15):
    run_sd15.output_dir.mkdir()
    (run_sd15.output_dir / "README.md").write_text("notes")
    with pytest.raises(ValueError, match="holds README.md of another run .*give another folder"):
        run_sd15(loss_space="latent")
    with pytest.raises(ValueError, match=r"holds README.md of another run .* move them first\.$"):
        run_sd15(loss_space="latent", resume_from_checkpoint="latest")
    assert (run_sd15.output_dir / "README.md").read_text() == "notes"


@pytest.mark.bad_input
def test_a_finished_lora_is_not_replaced(run_sd15):
    run_sd15(loss_space="latent")
    trained = run_sd15.lora()
    with pytest.raises(ValueError, match="holds checkpoint-2 of another run .*, or --resume_from_checkpoint latest"):
        run_sd15(loss_space="latent", seed=7)
    shutil.rmtree(run_sd15.output_dir / "checkpoint-2")
    with pytest.raises(ValueError, match="holds the LoRA of another run"):
        run_sd15(loss_space="latent", seed=7)
    with pytest.raises(ValueError, match=r"holds the LoRA of another run .* move them first\.$"):
        run_sd15(loss_space="latent", max_train_steps=4, resume_from_checkpoint="latest")
    assert equal(run_sd15.lora(), trained)


def test_what_is_called_otherwise_is_not_ours(run_sd15):
    run_sd15(checkpointing_steps=1, loss_space="latent")
    copies = [run_sd15.output_dir / name for name in ("checkpoint-1-good", "checkpoint-x", "my-checkpoint-9")]
    for copy in copies:
        shutil.copytree(run_sd15.output_dir / "checkpoint-1", copy)
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "loss_space": "latent"}
    run_sd15(max_train_steps=4, resume_from_checkpoint="latest", **options)
    assert all((copy / "training_state.json").is_file() for copy in copies)
    numbered = {path.name for path in run_sd15.output_dir.glob("checkpoint-*")} - {copy.name for copy in copies}
    assert numbered == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("number, passes", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.ENOSPC, False)])
def test_file_systems_that_synchronize_nothing(run_sd15, monkeypatch, number, passes):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if passes:
        run_sd15(loss_space="latent")
        assert (run_sd15.output_dir / "checkpoint-2/training_state.json").is_file()
    else:
        with pytest.raises(RuntimeError, match="checkpoint-2 could not be saved: .*No space left on device"):
            run_sd15(loss_space="latent")
        assert not list(run_sd15.output_dir.glob("*checkpoint-*"))


def test_local_checkpoints_are_loaded_by_name(run_sd15, monkeypatch):
    def guess(*args, **kwargs):
        raise ValueError("When using the offline mode, you must specify a `weight_name`.")

    run_sd15(loss_space="latent")
    monkeypatch.setattr(lora_base, "_best_guess_weight_name", guess)
    run_sd15(max_train_steps=3, loss_space="latent", resume_from_checkpoint="latest")
    assert (run_sd15.output_dir / "checkpoint-3").is_dir()


LAUNCHER = """
import os, sys
import train_ncp_dpo_sd15 as script
# As on machines of their own, each process has a folder that the other does not see.
os.chdir(sys.argv[1] + os.environ["RANK"])
script.main(script.parse_args(sys.argv[2:]))
"""


@pytest.mark.bad_input
def test_machines_that_share_no_folder(run_sd15, tmp_path):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    folders = [tmp_path / f"machine{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    run_sd15.output_dir = run_sd15.arguments["--output_dir"] = folders[0] / "output"
    run_sd15(loss_space="latent")
    run_sd15.edit_state("checkpoint-2", lambda state: state.update(pairs_per_step=4))
    run_sd15.arguments["--output_dir"] = "output"

    def launch(**options):
        words = run_sd15.command([], {"--loss_space": "latent", **{f"--{k}": v for k, v in options.items()}})
        return run_on_two_processes(launcher, [str(tmp_path / "machine"), *words], tmp_path / "log")

    # Averaging a LoRA that goes on with one that starts anew would ruin it.
    codes, log = launch(max_train_steps=3, resume_from_checkpoint="latest")
    assert codes == [1, 1]
    message = (
        r"Process 0 resumes from output/checkpoint-2, which processes \[1\] do not have: copy it to their machines"
    )
    assert len(re.findall(f"InputError: {message}", log)) == 2
    shutil.copytree(folders[0] / "output/checkpoint-2", folders[1] / "output/checkpoint-2")
    codes, log = launch(max_train_steps=3, resume_from_checkpoint="latest")
    assert codes == [0, 0], log
    assert (folders[0] / "output/checkpoint-3").is_dir()
    assert [path.name for path in folders[1].glob("output/*checkpoint-*")] == ["checkpoint-2"]
    # So would gradients of other pairs.
    columns = pair_columns(12)
    for folder in folders:
        columns["label_0"] = [1 - label for label in columns["label_0"]]
        write_parquet(folder / "data", columns)
    codes, log = launch(dataset_name="data", output_dir="of_other_pairs")
    assert codes == [1, 1]
    assert len(re.findall(r"InputError: Processes \[1\] have other pairs or models than process 0", log)) == 2


@pytest.mark.bad_input
def test_resume_refuses_more_steps_of_a_schedule_that_ends(run_sd15):
    run_sd15(checkpointing_steps=2, loss_space="latent", lr_scheduler="cosine")
    options = {"loss_space": "latent", "resume_from_checkpoint": "latest", "lr_scheduler": "cosine"}
    with pytest.raises(ValueError, match="--max_train_steps is 3, but was 2"):
        run_sd15(max_train_steps=3, **options)


@pytest.mark.bad_input
def test_resume_refuses_checkpoints_of_older_versions(run_sd15):
    run_sd15(loss_space="latent")
    run_sd15.edit_state("checkpoint-2", lambda state: state.pop("format"))
    used = {"timestep_weighting": "ncp", "sdpo_safeguard": True, "pretrained_lora_path": "somewhere"}
    unused = {"timestep_weighting": "none", "sdpo_safeguard": False, "pretrained_lora_path": None}
    for flags in [{}, unused, *({**unused, flag: used[flag]} for flag in used), used]:
        run_sd15.edit_state("checkpoint-2", lambda state: state["arguments"].update(flags))
        with pytest.raises(ValueError, match="checkpoint-2 is of an older version") as error:
            run_sd15(loss_space="latent", max_train_steps=3, resume_from_checkpoint="latest")
        named = [flag for flag, value in flags.items() if value == used[flag]]
        assert re.findall(r"--(\w+)", str(error.value)) == named


@pytest.mark.bad_input
def test_resume_refuses_other_pairs_per_step(run_sd15):
    run_sd15(loss_space="latent")
    with pytest.raises(ValueError, match="--gradient_accumulation_steps x processes is 6, was 2"):
        run_sd15(loss_space="latent", max_train_steps=3, train_batch_size=6, resume_from_checkpoint="latest")


@pytest.mark.bad_input
def test_going_back_refuses_to_meet_later_checkpoints(run_sd15, tmp_path):
    run_sd15(max_train_steps=3, checkpointing_steps=1, loss_space="latent")
    options = {"max_train_steps": 3, "checkpointing_steps": 1, "loss_space": "latent"}
    with pytest.raises(ValueError, match="holds checkpoint-2 to checkpoint-3 of another run"):
        run_sd15(resume_from_checkpoint="checkpoint-1", **options)
    run_sd15(
        resume_from_checkpoint=run_sd15.output_dir / "checkpoint-1", **{**options, "output_dir": tmp_path / "other"}
    )
    assert sorted(path.name for path in (tmp_path / "other").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    # Nor does it meet those of another run that are not later, or its LoRA.
    named = {"resume_from_checkpoint": run_sd15.output_dir / "checkpoint-3", **options, "max_train_steps": 4}
    with pytest.raises(ValueError, match="holds checkpoint-2 to checkpoint-3 of another run"):
        run_sd15(**{**named, "output_dir": tmp_path / "other"})
    for path in (tmp_path / "other").glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="holds the LoRA of another run"):
        run_sd15(**{**named, "output_dir": tmp_path / "other"})


@pytest.mark.bad_input
def test_resume_names_a_checkpoint_that_is_not_there(run_sd15):
    with pytest.raises(ValueError, match="there is no checkpoint checkpoint-7, nor .*output/checkpoint-7"):
        run_sd15(resume_from_checkpoint="checkpoint-7", loss_space="latent")


@pytest.mark.parametrize(
    "before, after",
    [
        ({"loss_space": "latent"}, {"loss_space": "ncp"}),
        ({"loss_space": "ncp"}, {"loss_space": "ncp", "ncp_layer": "down"}),
    ],
)
def test_an_error_scale_that_is_measured_on_resume_leaves_the_lora_alone(run_sd15, caplog, before, after):
    caplog.set_level(logging.INFO)
    run_sd15(checkpointing_steps=2, ncp_error_scale="auto", **before)
    trained = run_sd15.lora()
    caplog.clear()
    run_sd15("--allow_resume_changes", resume_from_checkpoint="latest", ncp_error_scale="auto", **after)
    assert "Perceptual errors are scaled by" in caplog.text
    scales = re.findall(r"scaled by --ncp_error_scale ([\d.]+)", caplog.text)
    state = json.loads((run_sd15.output_dir / "checkpoint-2/training_state.json").read_text())
    assert len(scales) == 1 and float(scales[0]) != state["error_scale"]
    assert equal(run_sd15.lora(), trained)


def test_validation_of_a_resumed_run_shows_the_base_model(run_sd15, tmp_path):
    options = {"loss_space": "latent", "validation_prompt": "a picture", "num_validation_images": 1}
    run_sd15("--run_validation", checkpointing_steps=1, **options)
    shutil.rmtree(run_sd15.output_dir / "checkpoint-2")
    folders = [run_sd15.output_dir / "validation", tmp_path / "other" / "validation"]
    options = {**options, "output_dir": tmp_path / "other"}
    run_sd15("--run_validation", resume_from_checkpoint=run_sd15.output_dir / "checkpoint-1", **options)
    for name in ("step-0.png", "before_after.png"):
        assert folders[0].joinpath(name).read_bytes() == folders[1].joinpath(name).read_bytes()


def test_the_reference_draws_images_that_are_not_finite(run_sd15, monkeypatch, caplog):
    decode, calls = AutoencoderKL.decode, []  # The reference draws before and after training.

    def decode_nan_twice(vae, latents, **options):
        calls.append(latents)
        decoded = decode(vae, latents, **options)
        decoded.sample.mul_(math.nan if len(calls) <= 2 else 1)
        return decoded

    monkeypatch.setattr(AutoencoderKL, "decode", decode_nan_twice)
    options = {"loss_space": "latent", "validation_prompt": "a picture", "num_validation_images": 1}
    run_sd15("--run_validation", **options)
    assert "gives images that are not finite at step 0" in caplog.text
    assert [path.name for path in (run_sd15.output_dir / "validation").iterdir()] == ["step-2.png"]
    assert (run_sd15.output_dir / "README.md").is_file()


def test_measurements_are_kept_until_their_replacement_is_whole(run_sd15, monkeypatch):
    options = {"loss_space": "latent", "num_eval_pairs": 2, "validation_steps": 1, "checkpointing_steps": 1}
    run_sd15(**options)
    before, write_text = (run_sd15.output_dir / "eval.csv").read_bytes(), Path.write_text

    def fill_the_disk(path, text, **options):
        if path.name.endswith("eval.csv"):
            write_text(path, text[:10], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_text", fill_the_disk)
        run_sd15(**{**options, "max_train_steps": 3, "resume_from_checkpoint": "latest"})
    assert (run_sd15.output_dir / "eval.csv").read_bytes() == before


def test_resume_changes_that_are_meant(run_sd15, caplog):
    run_sd15(checkpointing_steps=2, loss_space="latent")
    options = {"max_train_steps": 3, "learning_rate": 1e-4, "loss_space": "latent"}
    run_sd15("--allow_resume_changes", resume_from_checkpoint="latest", **options)
    assert "--learning_rate is 0.0001, but was 0.001" in caplog.text


def test_resume_keeps_a_seed_that_was_drawn(run_sd15):
    run_sd15(seed=None, max_train_steps=4, checkpointing_steps=2, loss_space="latent")
    drawn = run_sd15.lora()
    shutil.rmtree(run_sd15.output_dir / "checkpoint-4")
    run_sd15(seed=None, max_train_steps=4, resume_from_checkpoint="latest", loss_space="latent")
    assert equal(run_sd15.lora(), drawn)


def test_checkpoints_hold_no_token(run_sd15):
    run_sd15(checkpointing_steps=2, loss_space="latent", hub_token="hf_secret")
    assert "hf_secret" not in (run_sd15.output_dir / "checkpoint-2/training_state.json").read_text()


@pytest.mark.bad_input
def test_full_disk(run_sd15):
    run_sd15(max_train_steps=2, checkpointing_steps=2, loss_space="latent")

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = run_sd15.command(
        [],
        {
            "--loss_space": "latent",
            "--max_train_steps": 4,
            "--checkpointing_steps": 4,
            "--resume_from_checkpoint": "latest",
        },
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_ncp_dpo_sd15.py"), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=limit_file_size,
    )
    assert result.returncode == 1
    assert re.search(r"checkpoint-4 could not be saved: .*Whole checkpoints: checkpoint-2\. Make room", result.stderr)
    assert [path.name for path in run_sd15.output_dir.glob("*checkpoint-*")] == ["checkpoint-2"]
    run_sd15(max_train_steps=4, loss_space="latent", resume_from_checkpoint="latest")


@pytest.mark.parametrize("scale, finite", [(65536, True), (1, True), (0.5, False)])
def test_overflow_is_no_fault_while_the_loss_scale_can_fall(scale, finite):
    PartialState()  # what the scripts log through
    accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))

    def skipped_steps(**metrics):
        monitor = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(max_skipped_steps=1), skipped_steps=0)
        train_ncp_dpo_sd15.Monitor.check_finite(monitor, 1, metrics, [0])
        return monitor.skipped_steps

    assert skipped_steps(loss=1.0, grad_norm=math.inf) == (not finite)
    assert skipped_steps(loss=math.nan, grad_norm=1.0) == 1


def fail_at(monkeypatch, *steps):
    """Makes the policy's errors of these steps NaN."""
    calls = []
    latent_error = train_ncp_dpo_sd15.ncp_loss.latent_error

    def patched(model_pred, target):
        calls.append(1)
        # Two are of `check_prediction`. In a step the reference's errors come first.
        step, is_policy = divmod(len(calls) - 3, 2)
        return latent_error(model_pred, target) * (math.nan if is_policy and step + 1 in steps else 1)

    monkeypatch.setattr(train_ncp_dpo_sd15.ncp_loss, "latent_error", patched)


def test_steps_that_are_not_finite_are_skipped(run_sd15, monkeypatch, caplog):
    fail_at(monkeypatch, 3, 5)
    run_sd15(loss_space="latent", max_train_steps=6, max_skipped_steps=1)
    assert all(weight.isfinite().all() and weight.any() for weight in run_sd15.up_weights().values())
    assert len(re.findall(r"Step [35] is not finite: loss nan, .* It is skipped", caplog.text)) == 2


def test_too_many_steps_that_are_not_finite(run_sd15, monkeypatch):
    fail_at(monkeypatch, 3, 4)
    with pytest.raises(
        RuntimeError, match=r"Step 4 is not finite: loss nan, .* rows \[\d+, \d+\]. --max_skipped_steps 1"
    ):
        run_sd15(loss_space="latent", max_train_steps=6, max_skipped_steps=1)


@pytest.fixture(scope="module")
def scene_pairs(tmp_path_factory):
    """Pairs of well and badly drawn pictures for a base model that knows such."""
    folder = tmp_path_factory.mktemp("scenes") / "pairs"
    scenes, generator = SCENES[::20], torch.Generator().manual_seed(0)
    winners, losers = (map(encode_png, to_pil(render(scenes, generator, well_drawn=share))) for share in (1, 0))
    columns = {"jpg_0": list(winners), "jpg_1": list(losers), "caption": [scene.caption for scene in scenes]}
    Dataset.from_dict({**columns, "label_0": len(scenes) * [1.0]}).to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture
def scene_run(scene_pairs, tmp_path, monkeypatch):
    """β multiplies what the batch size changes in fp32 rounding. That is the smaller the better the model predicts: one with
    random weights would not do."""
    # As in other processes. Of a few pairs rounding would show.
    for name, number in (("SCALE_BLOCK_SIZE", 64), ("MAX_SCALE_PAIRS", 512)):
        monkeypatch.setattr(train_ncp_dpo_sd15, name, number)
    run = Run("sd15", ASSETS, scene_pairs, tmp_path / "output")
    # 11 pairs, 4 a step: the third epoch is begun.
    options = {"train_batch_size": 4, "max_train_samples": 11, "max_train_steps": 6, "ncp_error_scale": "auto"}
    options |= {"resolution": 48, "learning_rate": 1e-4}
    run.arguments |= {f"--{name}": value for name, value in options.items()}
    return run


@pytest.mark.parametrize("loss_space", ["latent", "ncp"])
def test_another_number_of_processes_goes_on_alike(scene_run, tmp_path, loss_space):
    options = {"loss_space": loss_space, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}
    scene_run(**options)
    one, losses, rates = scene_run.lora(), scene_run.scalars("loss"), scene_run.scalars("lr")
    scale = scene_run.state("checkpoint-6")["error_scale"]
    assert rates == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4, 1e-4])

    def run_on_two(steps):
        words = {**options, "train_batch_size": 2, "max_train_steps": steps, "resume_from_checkpoint": "latest"}
        words = scene_run.command([], {f"--{name}": value for name, value in words.items()})
        codes, log = run_on_two_processes("train_ncp_dpo_sd15.py", words, tmp_path / "log")
        assert codes == [0, 0], log

    scene_run.into("elastic")
    run_on_two(steps=2)
    # Measured on the same pairs.
    assert scene_run.state("checkpoint-2")["error_scale"] == (pytest.approx(scale, rel=1e-3) if scale else None)
    batches = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    scene_run(**options, **batches, max_train_steps=3, resume_from_checkpoint="latest")
    run_on_two(steps=6)
    assert scene_run.scalars("lr") == rates
    assert scene_run.scalars("loss") == pytest.approx(losses, abs=1e-4 if loss_space == "latent" else 1e-3)
    assert min(losses) < 0.69, "the policy left the reference"
    assert deviation(scene_run.lora(), one) < 1e-3


@pytest.mark.parametrize("loss_space", ["latent", "ncp"])
def test_another_accumulation_goes_on_alike(scene_run, loss_space):
    options = {"loss_space": loss_space, "ncp_error_scale": 1000}
    scene_run(**options, checkpointing_steps=3)
    unbroken, checkpoint = scene_run.lora(), scene_run.output_dir / "checkpoint-3"
    # accelerate had counted 3 batches by then. A step that counted on from them would end in its middle.
    options |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "resume_from_checkpoint": checkpoint}
    scene_run.into("resumed")(**options)
    assert scene_run.state("checkpoint-6")["next_pair"] == 24
    assert deviation(scene_run.lora(), unbroken) < 1e-3


def test_other_pairs_per_step_go_on_at_the_next_pair(run_sd15):
    # Nothing is learnt, and a loss is the mean of its pairs' errors: it tells which pairs of the stream a step had.
    options = {"loss_type": "sft", "loss_space": "latent", "learning_rate": 0}
    run_sd15(train_batch_size=1, max_train_steps=15, **options)
    errors = run_sd15.scalars("loss")
    assert len(set(errors)) == 15
    run_sd15.into("resumed")(train_batch_size=2, max_train_steps=3, **options)
    assert run_sd15.state("checkpoint-3")["next_pair"] == 6
    options |= {"train_batch_size": 3, "max_train_steps": 6, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="--train_batch_size x --gradient_accumulation_steps x processes is 3, was 2"):
        run_sd15(**options)
    run_sd15("--allow_resume_changes", **options)
    # The last step reaches into the second epoch: there are 12 pairs.
    steps = [errors[0:2], errors[2:4], errors[4:6], errors[6:9], errors[9:12], errors[12:15]]
    assert run_sd15.scalars("loss") == pytest.approx([sum(step) / len(step) for step in steps], rel=1e-5)
    assert run_sd15.state("checkpoint-6")["next_pair"] == 15
