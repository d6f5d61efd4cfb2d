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

"""Pairs are encoded once and whole, and training on them is training on their images."""

import json
import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import encode_preferences
import numpy as np
import preference_pairs
import pytest
import safetensors.torch
import torch
import train_ncp_dpo_sd15
import train_ncp_dpo_sdxl
from common import locked_folder, open_files, read_files
from conftest import SCRIPTS, reset_accelerate, run_on_two_processes
from datasets import Dataset
from PIL import Image
from tiny_checkpoints import (
    RESOLUTION,
    build_image_folder,
    build_parquet,
    change_weights,
    copy_checkpoint,
    edit_json,
    encoded,
    pair_columns,
    picture,
    write_parquet,
)

from diffusers import AutoencoderKL


@pytest.fixture
def encode(kind, checkpoints, parquet, tmp_path):
    return Encoding(checkpoints[kind], parquet, tmp_path / "encoded")


@pytest.fixture
def encode_sd15(checkpoints, parquet, tmp_path):
    return Encoding(checkpoints["sd15"], parquet, tmp_path / "encoded")


class Encoding:
    """Encodes for a tiny model: `Encoding(...)("--flag", name=value, ...)` in this process."""

    def __init__(self, checkpoint, dataset, output_dir):
        self.folder = output_dir
        self.arguments = {
            "pretrained_model_name_or_path": checkpoint,
            "dataset_name": dataset,
            "resolution": RESOLUTION,
            "num_workers": 2,
            "output_dir": output_dir,
        }

    def words(self, *flags, **options):
        arguments = {**self.arguments, **options}
        given = [word for name, value in arguments.items() if value is not None for word in (f"--{name}", value)]
        return [str(word) for word in [*given, *flags]]

    def __call__(self, *flags, **options):
        reset_accelerate()
        encode_preferences.main(encode_preferences.parse_args(self.words(*flags, **options)))
        return self

    def shards(self, part):
        return sorted((self.folder / part).iterdir())

    def rows(self, part):
        return [row for shard in self.shards(part) for row in Dataset.from_file(str(shard))]

    def contents(self):
        return {
            path.relative_to(self.folder): path.read_bytes() for p in ("pairs", "prompts") for path in self.shards(p)
        }


def losses_of_both(run, encode, precision, **options):
    """What training logs on images and on encoded data, from the same seed."""
    encode(mixed_precision=precision)
    run(mixed_precision=precision, **options)
    on_images = run.scalars("loss")
    run.into("on_encoded_data")
    run(mixed_precision=precision, dataset_name=None, encoded_data_dir=encode.folder, **options)
    return on_images, run.scalars("loss")


@pytest.mark.parametrize("loss_space", ["latent", "ncp"])
def test_training_on_encoded_data_equals_training_on_images(run, encode, loss_space):
    # β multiplies rounding, and Adam's first steps are its signs: both are kept from it.
    options = {"loss_type": "cpo", "beta_dpo": 1, "learning_rate": 0, "max_train_steps": 6, "ncp_error_scale": 3000}
    on_images, on_encoded_data = losses_of_both(run, encode, "no", loss_space=loss_space, **options)
    # The VAE rounds by how many images it has at once, and perceptual errors are differences over small steps: 2e-5 was seen.
    assert on_encoded_data == pytest.approx(on_images, rel=1e-5 if loss_space == "latent" else 1e-4)
    assert len(set(on_images)) == 6


def test_half_precision(run, encode):
    on_images, on_encoded_data = losses_of_both(run, encode, "bf16", loss_space="latent", loss_type="sft")
    assert on_encoded_data == pytest.approx(on_images, rel=2e-3)
    tensors = safetensors.torch.load(encode.rows("pairs")[0]["tensors"])
    assert tensors["latents"].dtype == torch.float16
    prompt = safetensors.torch.load(encode.rows("prompts")[0]["tensors"])
    assert {value.dtype for value in prompt.values()} == {torch.bfloat16}
    # What was encoded so can be trained on in another precision.
    run.into("on_encoded_data_in_fp32")
    run(mixed_precision="no", dataset_name=None, encoded_data_dir=encode.folder, loss_space="latent", loss_type="sft")
    assert run.scalars("loss") == pytest.approx(on_encoded_data, rel=2e-2)


def test_random_steps_see_both_orientations(run_sd15, encode_sd15):
    # Over two epochs pairs are flipped now and then, which the losses above would show; here is where they come from.
    latents = safetensors.torch.load(encode_sd15().rows("pairs")[0]["tensors"])["latents"]
    assert latents.shape == (2, 2, 4, 16, 16) and not torch.equal(latents[:, 0], latents[:, 1])
    encode_sd15.folder = encode_sd15.arguments["output_dir"] = encode_sd15.folder.with_name("upright")
    upright = safetensors.torch.load(encode_sd15("--no_hflip").rows("pairs")[0]["tensors"])["latents"]
    assert upright.shape == (2, 1, 4, 16, 16)
    torch.testing.assert_close(upright[:, 0], latents[:, 0])
    options = {"dataset_name": None, "encoded_data_dir": encode_sd15.folder, "loss_space": "latent"}
    with pytest.raises(ValueError, match="--no_hflip"):
        run_sd15(**options)
    run_sd15.into("no_hflip")("--no_hflip", **options)


def test_resume_is_exact(run_sd15, encode_sd15):
    encode_sd15()
    options = {"dataset_name": None, "encoded_data_dir": encode_sd15.folder, "max_train_steps": 9}
    run_sd15(checkpointing_steps=4, **options)
    uninterrupted = run_sd15.lora()
    shutil.rmtree(run_sd15.output_dir / "checkpoint-9")
    run_sd15(resume_from_checkpoint="latest", **options)
    assert all(torch.equal(weight, uninterrupted[name]) for name, weight in run_sd15.lora().items())


def test_images_and_encoded_data_are_the_same_data_to_a_resumed_run(run_sd15, encode_sd15):
    encode_sd15()
    run_sd15(loss_space="latent")
    options = {"loss_space": "latent", "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    run_sd15(dataset_name=None, encoded_data_dir=encode_sd15.folder, **options)
    assert (run_sd15.output_dir / "checkpoint-3").is_dir()


def test_rows_keep_their_numbers_and_captions_are_encoded_once(encode_sd15, tmp_path, monkeypatch):
    columns = pair_columns(6)
    columns["label_0"][1] = 0.5
    columns["caption"] = ["the first", "a tie's", "the second", "the first", "", "the second", "a tie's"]
    encoded, decoded, pixels = [], [], []
    spied = [
        (train_ncp_dpo_sd15, "encode_prompt", lambda pipeline, captions: encoded.extend(captions)),
        (preference_pairs, "read_image", lambda source: decoded.append(source)),
        (train_ncp_dpo_sd15, "encode_images", lambda vae, pixel_values, batch_size: pixels.append(len(pixel_values))),
    ]
    for module, name, record in spied:

        def spy(*arguments, record=record, function=getattr(module, name)):
            record(*arguments)
            return function(*arguments)

        monkeypatch.setattr(module, name, spy)
    encode_sd15(dataset_name=write_parquet(tmp_path / "data", columns), vae_encode_batch_size=8)
    assert encoded == ["the first", "the second", ""]
    # 5 pairs of 2 images, each once upright and once mirrored, two pairs in a batch.
    assert len(decoded) == 10 and pixels == [8, 8, 4]
    assert [row["row"] for row in encode_sd15.rows("pairs")] == [0, 2, 3, 4, 5]
    assert [row["prompt"] for row in encode_sd15.rows("pairs")] == [0, 1, 0, 2, 1]
    assert [row["label"] for row in encode_sd15.rows("pairs")] == [1, 1, 0, 1, 0]


def test_an_interrupted_encoding_goes_on(encode_sd15, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(encode_preferences, "SHARD_SIZE", 5)
    write_shard, written = encode_preferences.write_shard, []

    def interrupt(path, *arguments):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, *arguments)

    monkeypatch.setattr(encode_preferences, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_sd15()
    assert [len(encode_sd15.shards(part)) for part in ("prompts", "pairs")] == [3, 1]
    monkeypatch.setattr(encode_preferences, "write_shard", lambda *a: (written.append(a[0]), write_shard(*a))[1])
    encode_sd15()
    assert len(written) == len(set(written)) == 6
    interrupted = encode_sd15.contents()
    encode_sd15.folder = encode_sd15.arguments["output_dir"] = encode_sd15.folder.with_name("at_once")
    assert encode_sd15().contents() == interrupted
    caplog.clear()
    encode_sd15()
    assert "Nothing is left to encode" in caplog.text and "holds 12 pairs and 12 prompts" in caplog.text


def test_two_processes_write_what_one_writes(encode_sd15, monkeypatch, tmp_path):
    monkeypatch.setattr(encode_preferences, "SHARD_SIZE", 4)
    # Sums are in the order of the threads: one, as in the processes.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = encode_sd15().contents()
    torch.set_num_threads(num_threads)
    encode_sd15.folder = encode_sd15.arguments["output_dir"] = tmp_path / "two"
    script = tmp_path / "small_shards.py"
    script.write_text("import encode_preferences as tool; tool.SHARD_SIZE = 4; tool.main(tool.parse_args())")
    codes, log = run_on_two_processes(script, encode_sd15.words(), tmp_path / "log")
    assert codes == [0, 0], log
    assert encode_sd15.contents() == one
    assert len(encode_sd15.shards("pairs")) == len(encode_sd15.shards("prompts")) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resolution": 16}, "--resolution is 16, .* 32"),
        ({"image_interpolation_mode": "bicubic"}, "--image_interpolation_mode is 'bicubic', .*'lanczos'"),
        ({"max_train_samples": 4}, "--max_train_samples is 4, .*None"),
        ({"mixed_precision": "bf16"}, "--mixed_precision is 'bf16', .*'no'"),
    ],
)
@pytest.mark.bad_input
def test_other_settings_are_not_mixed(encode_sd15, options, message):
    before = encode_sd15().contents()
    with pytest.raises(ValueError, match=message):
        encode_sd15(**options)
    assert encode_sd15.contents() == before


@pytest.mark.bad_input
def test_other_data_are_not_mixed(encode_sd15, tmp_path):
    data = write_parquet(tmp_path / "data", pair_columns(6))
    encode_sd15(dataset_name=data)
    Dataset.from_dict({**pair_columns(6), "caption": ["another"] * 7}).to_parquet(f"{data}/train.parquet")
    with pytest.raises(ValueError, match="--output_dir"):
        encode_sd15(dataset_name=data)


def into(encode, name):
    encode.folder = encode.arguments["output_dir"] = encode.folder.with_name(name)
    return encode


def replace_image(data, row):
    """Puts another picture in the place of a row's first image, in a parquet file or a folder of images."""
    if (data / "metadata.jsonl").is_file():
        picture(50, (40, 48)).save(data / f"images/{row}_jpg_0.png")
    else:
        columns = Dataset.from_parquet(str(data / "train.parquet")).to_dict()
        columns["jpg_0"][row] = encoded(picture(50, (40, 48)))
        Dataset.from_dict(columns).to_parquet(str(data / "train.parquet"))


@pytest.mark.parametrize("source, build", [("dataset_name", build_parquet), ("train_data_dir", build_image_folder)])
def test_replaced_images_are_encoded_again(run_sd15, encode_sd15, tmp_path, monkeypatch, caplog, source, build):
    monkeypatch.setattr(encode_preferences, "SHARD_SIZE", 4)
    options = {"dataset_name": None, source: build(tmp_path / "data")}
    encode_sd15(**options)
    data = {"dataset_name": None, "encoded_data_dir": encode_sd15.folder}
    run_sd15(loss_space="latent", **data)
    before = encode_sd15.contents()
    replace_image(tmp_path / "data", row=5)
    encode_sd15(**options)
    assert "Row 5 " in caplog.text
    after = encode_sd15.contents()
    assert [name.as_posix() for name in after if after[name] != before[name]] == ["pairs/00001-of-00003.arrow"]
    assert into(encode_sd15, "fresh")(**options).contents() == after
    # Training on encoded data or on the images, which are the same data.
    for data in ({"dataset_name": None, "encoded_data_dir": tmp_path / "encoded"}, options):
        with pytest.raises(ValueError, match="data .*checkpoint-2"):
            run_sd15(max_train_steps=3, resume_from_checkpoint="latest", loss_space="latent", **data)
    # What is encoded and unchanged is not encoded again.
    caplog.clear()
    caplog.set_level(logging.INFO)
    into(encode_sd15, "encoded")(**options)
    assert "Nothing is left to encode" in caplog.text


@pytest.mark.bad_input
def test_an_image_that_was_left_out_and_mended_is_encoded(encode_sd15, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options = {"dataset_name": None, "train_data_dir": build_image_folder(tmp_path / "data"), "on_bad_sample": "skip"}
    image = tmp_path / "data/images/1_jpg_0.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    encode_sd15(**options)
    left_out = encode_sd15.contents()
    # It is tried again, and left out again.
    assert encode_sd15(**options).contents() == left_out
    assert "Nothing is left to encode" in caplog.text
    image.write_bytes(whole)
    mended = encode_sd15(**options).contents()
    assert [row["row"] for row in encode_sd15.rows("pairs")] == list(range(12))
    assert into(encode_sd15, "fresh")(**options).contents() == mended


def test_a_missing_image_that_came_back_is_encoded(encode_sd15, tmp_path):
    options = {"dataset_name": None, "train_data_dir": build_image_folder(tmp_path / "data"), "on_bad_sample": "skip"}
    (tmp_path / "data/images/1_jpg_1.png").rename(tmp_path / "elsewhere.png")
    assert len(encode_sd15(**options).rows("pairs")) == 11
    (tmp_path / "elsewhere.png").rename(tmp_path / "data/images/1_jpg_1.png")
    assert len(encode_sd15(**options).rows("pairs")) == 12
    # While a disk is away, nothing is removed.
    before = encode_sd15.contents()
    (tmp_path / "data/images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="Row 0 .*jpg_0 cannot be read"):
        encode_sd15(**{**options, "on_bad_sample": "error"})
    assert encode_sd15(**options).contents() == before
    (tmp_path / "elsewhere").rename(tmp_path / "data/images")
    assert encode_sd15(**options).contents() == before


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.bad_input
def test_a_replaced_model_is_refused(run_sd15, encode_sd15, checkpoints, tmp_path, request, part):
    model = copy_checkpoint(checkpoints["sd15"], tmp_path / "model")
    before = encode_sd15(pretrained_model_name_or_path=model).contents()
    change_weights(model / part)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*model: {part} changed"):
        encode_sd15(pretrained_model_name_or_path=model)
    assert encode_sd15.contents() == before
    request.getfixturevalue("no_models")
    options = {"pretrained_model_name_or_path": model, "dataset_name": None, "encoded_data_dir": encode_sd15.folder}
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*model: {part} changed"):
        run_sd15(**options)


def test_all_folders_can_be_moved(run_sd15, encode_sd15, checkpoints, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(encode_preferences, "SHARD_SIZE", 5)
    model, data = copy_checkpoint(checkpoints["sd15"], tmp_path / "model"), build_parquet(tmp_path / "data")
    encode_sd15(pretrained_model_name_or_path=model, dataset_name=data)
    before = encode_sd15.contents()
    for folder in (model, tmp_path / "data", encode_sd15.folder):
        # A copy has other times.
        shutil.copytree(folder, tmp_path / "moved" / folder.name, copy_function=shutil.copy)
        shutil.rmtree(folder)
    encode_sd15.folder = encode_sd15.arguments["output_dir"] = tmp_path / "moved/encoded"
    encode_sd15.shards("pairs")[1].unlink()
    options = {"pretrained_model_name_or_path": tmp_path / "moved/model"}
    encode_sd15(dataset_name=tmp_path / "moved/data", **options)
    assert encode_sd15.contents() == before
    # A U-Net of another training goes on with the same latents and embeddings.
    change_weights(tmp_path / "moved/model/unet")
    run_sd15(dataset_name=None, encoded_data_dir=encode_sd15.folder, loss_space="latent", **options)
    assert run_sd15.lora()


def test_an_older_encoding_goes_on(run_sd15, encode_sd15, monkeypatch, caplog):
    monkeypatch.setattr(encode_preferences, "SHARD_SIZE", 4)
    encode_sd15()
    expected = [row["tensors"] for row in encode_sd15.rows("pairs")]
    edit_json(encode_sd15.folder / "encoding.json", models=..., images=...)
    features = {name: kind for name, kind in encode_preferences.PAIRS.items() if "digest" not in name}
    for shard in encode_sd15.shards("pairs"):
        rows = Dataset.from_file(str(shard)).select_columns(list(features)).to_list()
        encode_preferences.write_shard(shard, datasets.Features(features), rows)
    encode_sd15.shards("pairs")[1].unlink()
    encode_sd15()
    assert "encoded does not say which files" in caplog.text
    assert [row["tensors"] for row in encode_sd15.rows("pairs")] == expected
    caplog.clear()
    run_sd15(dataset_name=None, encoded_data_dir=encode_sd15.folder, loss_space="latent")
    assert f"{encode_sd15.folder} does not say which files" in caplog.text


@pytest.mark.bad_input
def test_another_commit_on_the_hub_is_refused(encode_sd15, tmp_path, monkeypatch):
    urls = [f"file://{build_parquet(tmp_path / commit)}/train.parquet" for commit in ("commit_1", "commit_2")]
    # No hub is at hand.
    monkeypatch.setattr(encode_preferences, "find_remote_files", lambda args: urls[:1])
    before = encode_sd15(dataset_name="a/dataset").contents()
    assert encode_sd15(dataset_name="a/dataset").contents() == before
    monkeypatch.setattr(encode_preferences, "find_remote_files", lambda args: urls[1:])
    with pytest.raises(ValueError, match="--dataset_name a/dataset changed"):
        encode_sd15(dataset_name="a/dataset")
    assert encode_sd15.contents() == before


@pytest.mark.bad_input
def test_two_runs_do_not_write_to_one_folder(encode_sd15):
    with locked_folder(encode_sd15.folder), pytest.raises(ValueError, match="--output_dir .*encoded"):
        encode_sd15()
    assert not (encode_sd15.folder / "encoding.json").exists()
    # The lock ends with the run that holds it.
    encode_sd15()


@pytest.mark.bad_input
def test_a_folder_of_somebody_else_is_left_alone(encode_sd15):
    encode_sd15.folder.mkdir()
    (encode_sd15.folder / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output_dir .*encoded .*diary.txt"):
        encode_sd15()
    assert [path.name for path in encode_sd15.folder.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resolution": 16}, "--resolution is 16, .* 32"),
        ({"image_interpolation_mode": "nearest"}, "--image_interpolation_mode is 'nearest', .*'lanczos'"),
        ({"image_0_column": "better"}, "--image_0_column is 'better', .*'jpg_0'"),
        ({"dataset_name": "pairs"}, "--dataset_name, --train_data_dir and --encoded_data_dir"),
    ],
)
@pytest.mark.bad_input
def test_training_refuses_data_of_other_settings(run_sd15, encode_sd15, request, options, message):
    encode_sd15()
    request.getfixturevalue("no_models")
    with pytest.raises(ValueError, match=message):
        run_sd15(**{"dataset_name": None, "encoded_data_dir": encode_sd15.folder, **options})


@pytest.mark.bad_input
def test_training_refuses_latents_of_another_scale_and_warns_of_another_model(
    run_sd15, encode_sd15, checkpoints, tmp_path, caplog
):
    encode_sd15()
    other = Path(copy_checkpoint(checkpoints["sd15"], tmp_path / "other"))
    change_weights(other / "text_encoder")
    options = {"dataset_name": None, "encoded_data_dir": encode_sd15.folder, "loss_space": "latent"}
    run_sd15(pretrained_model_name_or_path=other, mixed_precision="bf16", **options)
    assert re.search("--pretrained_model_name_or_path is '.*other', .*'.*sd15'", caplog.text)
    assert "--mixed_precision is 'bf16'" in caplog.text
    edit_json(other / "vae/config.json", scaling_factor=0.5)
    with pytest.raises(ValueError, match="--vae_scaling_factor is 0.5, .* 0.18215"):
        run_sd15.into("scale")(pretrained_model_name_or_path=other, **options)


@pytest.mark.bad_input
def test_training_refuses_what_is_not_whole(run_sd15, encode_sd15, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_preferences, "SHARD_SIZE", 4)
    encode_sd15().shards("pairs")[1].unlink()
    with pytest.raises(ValueError, match="pairs holds 2 of 3 files"):
        run_sd15(dataset_name=None, encoded_data_dir=encode_sd15.folder)
    with pytest.raises(ValueError, match="--encoded_data_dir .*encoding.json"):
        run_sd15(dataset_name=None, encoded_data_dir=tmp_path)


@pytest.mark.bad_input
def test_unreadable_pairs(run_sd15, encode_sd15, tmp_path, caplog):
    columns = pair_columns(5)
    columns["jpg_1"][3] = b"\xff\xd8 broken"
    data = write_parquet(tmp_path / "data", columns)
    with pytest.raises(ValueError, match=r"Row 3 \('picture number 3'\): jpg_1"):
        encode_sd15(dataset_name=data)
    encode_sd15(dataset_name=data, on_bad_sample="skip")
    assert "Row 3 ('picture number 3'): jpg_1" in caplog.text
    assert "1 unreadable pairs were left out" in caplog.text
    assert [row["row"] for row in encode_sd15.rows("pairs")] == [0, 1, 2, 4]
    run_sd15(dataset_name=None, encoded_data_dir=encode_sd15.folder, loss_space="latent")
    assert all(weight.any() for weight in run_sd15.up_weights().values())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "part, weight, name",
    [
        ("vae", "quant_conv.bias", r"Row 0 \('picture number 0'\)"),
        ("text_encoder", "final_layer_norm.bias", "Prompt 'picture number 0'"),
    ],
)
def test_encodings_that_are_not_finite_are_refused(encode_sd15, checkpoints, tmp_path, part, weight, name):
    model = copy_checkpoint(checkpoints["sd15"], tmp_path / "model")
    (file,) = (model / part).glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    (weight,) = [key for key in weights if key.endswith(weight) and "post" not in key]
    weights[weight][:] = float("nan")
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    message = f"{name} .*--pretrained_model_name_or_path {model}.* --mixed_precision no"
    with pytest.raises(ValueError, match=message):
        encode_sd15(pretrained_model_name_or_path=model)
    assert not list((encode_sd15.folder / "pairs").iterdir())


def test_anybody_can_open_it(encode, tmp_path):
    encode()
    opened = {
        part: datasets.load_dataset(str(encode.folder), part, split="train", cache_dir=str(tmp_path / "cache"))
        for part in ("pairs", "prompts")
    }
    assert [row["caption"] for row in opened["prompts"]] == [f"picture number {index}" for index in range(12)]
    assert opened["pairs"][3] == encode.rows("pairs")[3]
    encoding = json.loads((encode.folder / "encoding.json").read_text(encoding="utf-8"))
    assert encoding["trainer"] in {f"{script}.py" for script in SCRIPTS.values()} and encoding["num_pairs"] == 12


def test_training_on_encoded_data_loads_encoders_for_validation_only(run, encode, monkeypatch):
    encode()
    script = {"sd15": train_ncp_dpo_sd15, "sdxl": train_ncp_dpo_sdxl}[run.kind]
    loaded = []
    from_pretrained = AutoencoderKL.from_pretrained.__func__

    def spy(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return from_pretrained(cls, *args, **kwargs)

    monkeypatch.setattr(script.AutoencoderKL, "from_pretrained", classmethod(spy))
    options = {"dataset_name": None, "encoded_data_dir": encode.folder, "loss_space": "latent", "max_train_steps": 1}
    run(**options)
    assert loaded == []
    run.into("validation")("--run_validation", validation_prompt="a picture", num_validation_images=1, **options)
    assert loaded == ["AutoencoderKL"]
    assert np.asarray(Image.open(run.output_dir / "validation/step-1.png")).std() > 0


@pytest.mark.parametrize("max_train_samples", [None, 5])
def test_parquet_files_are_read_in_order_where_they_are(tmp_path, max_train_samples):
    dataset = Dataset.from_dict(pair_columns(12))
    for shard in range(3):
        path = tmp_path / f"train-{shard}.parquet"
        dataset.shard(3, shard, contiguous=True).to_parquet(str(path), batch_size=2)
    arguments = ["--pretrained_model_name_or_path", "m", "--dataset_name", str(tmp_path), "--output_dir", "o"]
    arguments += [] if max_train_samples is None else ["--max_train_samples", str(max_train_samples)]
    args = encode_preferences.parse_args(arguments)
    expected = preference_pairs.load_dataset(args)
    urls = [f"file://{path}" for path in sorted(tmp_path.glob("*.parquet"))]
    with ThreadPoolExecutor(2) as pool:
        files, labels = open_files(args, urls, pool, args.num_workers)
        # No more files than are needed.
        assert len(labels) == (13 if max_train_samples is None else 5)
        rows = preference_pairs.find_rows(args, labels)
        assert rows == preference_pairs.find_rows(args, expected)
        assert list(read_files(files, rows)) == [(row, expected[row]) for row in rows]
        assert list(read_files(files, [11])) == [(11, expected[11])]


@pytest.mark.parametrize("change", [{"label_0": None}, {"label_0": ["1"] * 7}])
@pytest.mark.bad_input
def test_a_parquet_file_with_a_wrong_column_is_named(tmp_path, change):
    for index, columns in enumerate((pair_columns(6), {**pair_columns(6), **change})):
        columns = {name: values for name, values in columns.items() if values is not None}
        Dataset.from_dict(columns).to_parquet(str(tmp_path / f"train-{index}.parquet"))
    arguments = ["--pretrained_model_name_or_path", "m", "--dataset_name", str(tmp_path), "--output_dir", "o"]
    with (
        ThreadPoolExecutor(2) as pool,
        pytest.raises(ValueError, match=r"train-1.parquet: .*label_0.*\(--label_column\)"),
    ):
        urls = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
        open_files(encode_preferences.parse_args(arguments), urls, pool, 4)
