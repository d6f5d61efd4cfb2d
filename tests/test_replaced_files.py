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

"""A name does not stand for content: files that were replaced under the same name, or that are not whole, are named."""

import os
import re
import shutil
from pathlib import Path

import datasets
import preference_pairs
import pytest
import train_ncp_dpo_sd15
from datasets import Dataset
from tiny_checkpoints import (
    build_image_folder,
    change_weights,
    copy_checkpoint,
    edit_json,
    encoded,
    pair_columns,
    picture,
    write_parquet,
)


# A run of two steps goes on.
RESUME = {"loss_space": "latent", "max_train_steps": 3, "resume_from_checkpoint": "latest"}


@pytest.fixture
def model(checkpoints, tmp_path):
    return copy_checkpoint(checkpoints["sd15"], tmp_path / "model")


@pytest.fixture
def vae(checkpoints, tmp_path):
    return Path(shutil.copytree(Path(checkpoints["sd15"], "vae"), tmp_path / "vae"))


@pytest.fixture
def lora(run_sd15, tmp_path):
    """A LoRA to start from."""
    run_sd15.into("first")(loss_space="latent")
    run_sd15.into("output")
    return tmp_path / "first/pytorch_lora_weights.safetensors"


@pytest.mark.bad_input
def test_resume_refuses_replaced_models(run_sd15, model, vae, lora, tmp_path):
    options = {"pretrained_model_name_or_path": model, "pretrained_vae_model_name_or_path": vae}
    options["pretrained_lora_path"] = lora.parent
    run_sd15(loss_space="latent", **options)
    folders = {"unet": model / "unet", "text_encoder": model / "text_encoder", "vae": vae, "lora": lora.parent}
    for part, folder in folders.items():
        shutil.copytree(folder, tmp_path / "whole" / part)
        change_weights(lora if part == "lora" else folder)
        with pytest.raises(ValueError, match=f"files of {part} were others in .*checkpoint-2"):
            run_sd15(**RESUME, **options)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole" / part, folder)
    scheduler = model / "scheduler/scheduler_config.json"
    before = scheduler.read_text()
    edit_json(scheduler, beta_end=0.013)
    with pytest.raises(ValueError, match="files of scheduler were others"):
        run_sd15(**RESUME, **options)
    scheduler.write_text(before)
    # Of the same content again, and without what is not read.
    change_weights(model / "vae")
    (lora.parent / "pytorch_lora_weights_kohya.safetensors").unlink()
    run_sd15(**RESUME, **options)
    assert (run_sd15.output_dir / "checkpoint-3").is_dir()


@pytest.mark.bad_input
def test_a_replaced_model_can_be_allowed(run_sd15, model, caplog):
    run_sd15(loss_space="latent", pretrained_model_name_or_path=model)
    change_weights(model / "unet")
    run_sd15("--allow_resume_changes", pretrained_model_name_or_path=model, **RESUME)
    assert re.search("files of unet were others in .*checkpoint-2", caplog.text)


def test_models_can_be_moved(run_sd15, model, vae, lora, tmp_path):
    folders = {"pretrained_model_name_or_path": model, "pretrained_vae_model_name_or_path": vae}
    folders["pretrained_lora_path"] = lora.parent
    run_sd15(loss_space="latent", **folders)
    for flag, folder in folders.items():
        # A copy has other times.
        folders[flag] = shutil.copytree(folder, tmp_path / "moved" / folder.name, copy_function=shutil.copy)
        shutil.rmtree(folder)
    run_sd15(**RESUME, **folders)
    assert (run_sd15.output_dir / "checkpoint-3").is_dir()


def test_an_older_checkpoint_is_compared_by_names(run_sd15, model, checkpoints):
    run_sd15(loss_space="latent", pretrained_model_name_or_path=model)
    run_sd15.edit_state("checkpoint-2", lambda state: (state.pop("models"), state["data"].pop("images")))
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path is .*sd15', but was .*model'"):
        run_sd15(**RESUME)
    run_sd15(pretrained_model_name_or_path=model, **RESUME)
    assert (run_sd15.output_dir / "checkpoint-3").is_dir()


def test_other_variants_do_not_matter(model):
    unet = model / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(unet, unet.with_suffix(".fp16.safetensors"))
    words = ["--pretrained_model_name_or_path", str(model), "--dataset_name", "none"]
    args = train_ncp_dpo_sd15.parse_args(words)
    args_of_variant = train_ncp_dpo_sd15.parse_args([*words, "--variant", "fp16"])
    before, before_of_variant = preference_pairs.digest_models(args), preference_pairs.digest_models(args_of_variant)
    change_weights(unet.with_suffix(".fp16.safetensors"))
    assert preference_pairs.digest_models(args) == before
    assert preference_pairs.digest_models(args_of_variant)["unet"] != before_of_variant["unet"]


def test_hub_ids_are_known_by_their_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(preference_pairs, "HF_HUB_CACHE", str(tmp_path))
    for name, revision, commit in [
        ("a--model", "main", "1" * 40),
        ("a--model", "fp16", "2" * 40),
        ("a--vae", "main", "3" * 40),
    ]:
        reference = tmp_path / f"models--{name}/refs/{revision}"
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)

    def digest(*words):
        words = ["--pretrained_model_name_or_path", "a/model", "--dataset_name", "none", *words]
        return preference_pairs.digest_models(train_ncp_dpo_sd15.parse_args(words))

    assert {*digest().values()} == {"1" * 40}
    assert {*digest("--revision", "fp16").values()} == {"2" * 40}
    # A commit is a revision too.
    assert digest("--revision", "1" * 40) == digest()
    own_vae = digest("--pretrained_vae_model_name_or_path", "a/vae", "--revision", "fp16")
    assert (own_vae["vae"], own_vae["unet"]) == ("3" * 40, "2" * 40)


@pytest.mark.parametrize("kind", ["parquet", "images", "parquet that names images"])
@pytest.mark.bad_input
def test_resume_refuses_replaced_images(run_sd15, tmp_path, kind):
    build_image_folder(tmp_path / "data")
    images = sorted((tmp_path / "data/images").iterdir())
    columns = pair_columns(12)
    if kind == "parquet that names images":
        for column in ("jpg_0", "jpg_1"):
            names = [f"images/{index}_{column}.png" for index in range(13)]
            columns[column] = [{"bytes": None, "path": name} for name in names]
    options = {"loss_space": "latent", "dataset_name": tmp_path / "data"}
    if kind == "images":
        options = {"loss_space": "latent", "dataset_name": None, "train_data_dir": tmp_path / "data"}
    else:
        (tmp_path / "data/metadata.jsonl").unlink()
        Dataset.from_dict(columns).to_parquet(str(tmp_path / "data/train.parquet"))
    run_sd15(**options)
    if kind == "parquet":
        columns["jpg_0"][3] = encoded(picture(50, (40, 48)))
        Dataset.from_dict(columns).to_parquet(str(tmp_path / "data/train.parquet"))
    else:
        picture(50, (40, 48)).save(images[3])
    with pytest.raises(ValueError, match="the data are 12 pairs, but were 12 others in .*checkpoint-2"):
        run_sd15(**{**RESUME, **options})


def test_a_replaced_parquet_file_is_read_anew(tmp_path):
    words = ["--pretrained_model_name_or_path", "none", "--dataset_name", str(tmp_path)]
    args, columns = train_ncp_dpo_sd15.parse_args(words), pair_columns(6)
    file = Path(write_parquet(tmp_path / "data", columns), "train.parquet")
    stat = file.stat()
    assert preference_pairs.load_dataset(args)["caption"][:] == columns["caption"]
    columns["caption"] = columns["caption"][::-1]
    Dataset.from_dict(columns).to_parquet(str(file))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert preference_pairs.load_dataset(args)["caption"][:] == columns["caption"]


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    read, sha_fileobj = [], preference_pairs.sha_fileobj
    monkeypatch.setattr(preference_pairs, "sha_fileobj", lambda file: (read.append(file.name), sha_fileobj(file))[1])
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"before")
    before = preference_pairs.digest_files(files)
    assert preference_pairs.digest_files(files) == before and read == [str(file) for file in files]
    stat = files[1].stat()
    files[1].write_bytes(b"behind")
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert preference_pairs.digest_files(files) != before and len(read) == 4
    files[1].write_bytes(b"before")
    assert preference_pairs.digest_files(files) == before
    # A cache that cannot be written is no error.
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", files[0])
    assert preference_pairs.digest_files(files) == before


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 492265168\n"
FAULTS = {"pointer": lambda data: POINTER, "cut off": lambda data: data[: len(data) // 2], "empty": lambda data: b""}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.bad_input
def test_weights_that_are_not_whole(run_sd15, model, vae, tmp_path, fault):
    places = {
        model / "unet": "pretrained_model_name_or_path",
        model / "text_encoder": "pretrained_model_name_or_path",
        vae: "pretrained_vae_model_name_or_path",
    }
    for folder, flag in places.items():
        path = next(folder.glob("*.safetensors"))
        whole = path.read_bytes()
        path.write_bytes(FAULTS[fault](whole))
        with pytest.raises(
            ValueError, match=f"--pretrained_model_name_or_path .*{re.escape(str(path))} is .*{fault}"
        ) as raised:
            run_sd15(loss_space="latent", **{flag: vae if folder == vae else model})
        assert "\n" not in str(raised.value)
        path.write_bytes(whole)
        shutil.rmtree(run_sd15.output_dir)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.bad_input
def test_a_lora_that_is_not_whole(run_sd15, lora, no_models, fault):
    lora.write_bytes(FAULTS[fault](lora.read_bytes()))
    for path in (lora, lora.parent):
        with pytest.raises(ValueError, match=f"--pretrained_lora_path .*{re.escape(str(lora))} is .*{fault}"):
            run_sd15(pretrained_lora_path=path)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.bad_input
def test_a_parquet_file_that_is_not_whole(run_sd15, no_models, tmp_path, fault):
    file = Path(write_parquet(tmp_path / "data", pair_columns(6)), "train.parquet")
    file.write_bytes(FAULTS[fault](file.read_bytes()))
    with pytest.raises(ValueError, match="--dataset_name .*data.*/train.parquet"):
        run_sd15(dataset_name=tmp_path / "data")
