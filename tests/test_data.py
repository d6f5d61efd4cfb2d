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

"""From a dataset's row to the batch, and what is said of bad input before any model is loaded."""

import contextlib
import gc
import itertools
import json
import logging
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from conftest import Run
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from tiny_checkpoints import build_image_folder, encoded, pair_columns, picture
from transformers import CLIPTextModel

import train_ncp_dpo_sd15
import train_ncp_dpo_sdxl
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import is_wandb_available
from train_ncp_dpo_sd15 import EpochSampler, PreferencePairs, collate_fn, load_pairs, read_image, resize_and_crop


COLUMNS = {
    "image_0_column": "jpg_0",
    "image_1_column": "jpg_1",
    "label_column": "label_0",
    "caption_column": "caption",
}


def arguments(**options):
    defaults = {
        **COLUMNS,
        "resolution": 32,
        "random_crop": False,
        "no_hflip": False,
        "image_interpolation_mode": "lanczos",
        "seed": 0,
        "loss_type": "dpo",
        "on_bad_sample": "error",
        "streaming": False,
    }
    return Namespace(**{**defaults, **options})


def make_pairs(columns, module=train_ncp_dpo_sd15, **options):
    rows = list(range(len(columns["label_0"])))
    return module.PreferencePairs(Dataset.from_dict(columns), rows, arguments(**options), (4, 16, 16), 1000)


def images(example):
    return [image["pixel_values"] for image in example["images"]]


@pytest.fixture(autouse=True)
def accelerate_state():
    """What the scripts' functions log through, when a test calls them without `main`."""
    PartialState()


def test_the_winner_comes_first():
    pairs = make_pairs(pair_columns(4))
    for row in range(4):
        winner, loser = images(pairs[0, row])
        assert winner.mean() > loser.mean() + 0.1


def test_a_pair_depends_on_seed_epoch_and_row_alone():
    columns = pair_columns(4)
    first, again = make_pairs(columns, random_crop=True)[3, 2], make_pairs(columns, random_crop=True)[3, 2]
    assert all(torch.equal(a, b) for a, b in zip(images(first), images(again)))
    assert all(torch.equal(first[name], again[name]) for name in ("noise", "variance_noise", "timesteps"))
    for other in (make_pairs(columns)[4, 2], make_pairs(columns)[3, 1], make_pairs(columns, seed=1)[3, 2]):
        assert not torch.equal(first["noise"], other["noise"])
    assert not torch.equal(first["noise"], first["variance_noise"])


def test_swapping_a_pair_with_its_label_changes_nothing():
    columns = pair_columns(2)
    swapped = {**columns, "jpg_0": columns["jpg_1"], "jpg_1": columns["jpg_0"]}
    swapped["label_0"] = [1 - label for label in columns["label_0"]]
    for a, b in zip(images(make_pairs(columns)[0, 0]), images(make_pairs(swapped)[0, 0])):
        assert torch.equal(a, b)


def test_winner_and_loser_share_flip_and_crop():
    # The same picture twice, once larger: what is cropped of it must be the same part.
    small, large = picture(0, size=(48, 64)), picture(0, size=(96, 128))
    columns = {"jpg_0": [encoded(small)], "jpg_1": [encoded(large)], "label_0": [1.0], "caption": ["x"]}
    pairs = make_pairs(columns, random_crop=True)
    crops = []
    for epoch in range(8):
        winner, loser = images(pairs[epoch, 0])
        assert (winner - loser).abs().mean() < 0.05
        crops.append(winner)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 5


def test_flips_half_of_the_time_and_not_at_all_if_told():
    columns = {name: values[:1] for name, values in pair_columns(1).items()}
    upright = images(make_pairs(columns, no_hflip=True)[0, 0])[0]
    flipped = [not torch.equal(images(make_pairs(columns)[epoch, 0])[0], upright) for epoch in range(40)]
    assert 10 < sum(flipped) < 30
    assert all(torch.equal(images(make_pairs(columns, no_hflip=True)[e, 0])[0], upright) for e in range(5))


def test_sft_leaves_losers_unread():
    columns = pair_columns(2)
    columns["jpg_1"][0] = b"not an image"
    assert len(images(make_pairs(columns, loss_type="sft")[0, 0])) == 1


def test_collate_puts_winners_before_losers():
    pairs = make_pairs(pair_columns(3))
    batch = collate_fn([pairs[0, row] for row in range(3)])
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    winners, losers = batch["pixel_values"].chunk(2)
    assert (winners.mean(dim=(1, 2, 3)) > losers.mean(dim=(1, 2, 3))).all()
    assert batch["noise"].shape == (3, 4, 16, 16) and batch["timesteps"].shape == (3,)
    assert batch["captions"] == [f"picture number {row}" for row in range(3)]


def test_sdxl_time_ids_are_each_images_own():
    columns = {
        "jpg_0": [encoded(picture(0, size=(64, 48)))],
        "jpg_1": [encoded(picture(1, size=(40, 80)))],
        "label_0": [0.0],
        "caption": ["x"],
    }
    pairs = make_pairs(columns, train_ncp_dpo_sdxl)
    time_ids = train_ncp_dpo_sdxl.collate_fn([pairs[0, 0]])["time_ids"]
    # Height, width, top, left, and twice the resolution; resized to 32 x 64 and 43 x 32, cropped in the middle.
    assert time_ids.tolist() == [[80, 40, 16, 0, 32, 32], [48, 64, 0, 6, 32, 32]]


def test_epoch_sampler():
    sampler = EpochSampler([5, 6, 7, 8, 9, 11], seed=0)
    first = list(sampler)
    assert first == list(EpochSampler(sampler.rows, seed=0))
    assert sorted(row for _, row in first) == sampler.rows and {epoch for epoch, _ in first} == {0}
    sampler.epoch = 1
    assert [row for _, row in sampler] != [row for _, row in first]


def test_resize_keeps_the_aspect_ratio():
    image = Image.new("RGB", (100, 50))
    image.paste("white", (25, 0, 75, 50))
    pixel_values, crop = resize_and_crop(image, arguments(), (0.5, 0.5), flip=False)
    assert crop == (0, 16) and pixel_values.shape == (3, 32, 32)
    assert pixel_values[:, :, 2:-2].min() > 0.9


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    grey = Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8).repeat(4, 0).repeat(4, 1))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode in ("LA", "RGBA"):
        image = grey.convert(mode)
        image.putalpha(Image.new("L", image.size, 255))
    else:
        image = grey.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    result = read_image(str(path))
    assert result.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(result).astype(int) - np.asarray(grey)[..., None]).max() <= 6


def test_transparency_becomes_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    pixels = np.asarray(read_image(encoded(image)))
    assert (pixels[:, :4] == [255, 0, 0]).all() and (pixels[:, 4:] == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "image.jpg", exif=exif)
    assert read_image(str(tmp_path / "image.jpg")).size == (10, 20)


@pytest.fixture
def no_models(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", refuse)


def parquet_of(folder, columns):
    folder.mkdir()
    Dataset.from_dict(columns).to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "kto"}, "--loss_type is 'kto', but must be one of dpo, ipo, hinge, cpo, sft"),
        ({"loss_space": "pixel"}, "--loss_space is 'pixel'"),
        ({"ncp_layer": "up"}, "--ncp_layer is 'up'"),
        ({"ncp_timestep": "next"}, "--ncp_timestep is 'next'"),
        ({"image_interpolation_mode": "cubic"}, "--image_interpolation_mode is 'cubic'"),
        ({"lr_scheduler": "step"}, "--lr_scheduler is 'step'"),
        ({"rank": 0}, "--rank is 0, but must be at least 1"),
        ({"resolution": 33}, "--resolution is 33, but must be a multiple of 2"),
        ({"beta_dpo": 0}, "--beta_dpo is 0"),
        ({"label_smoothing": 0.5}, "--label_smoothing is 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "--label_smoothing goes with --loss_type dpo or cpo"),
        ({"ncp_probe_rms": -1}, "--ncp_probe_rms is -1"),
        ({"ncp_error_scale": 0}, "--ncp_error_scale is 0"),
        ({"on_bad_sample": "ignore"}, "--on_bad_sample is 'ignore'"),
        ({"dataset_name": None}, "exactly one of --dataset_name and --train_data_dir"),
        ({"train_data_dir": "somewhere"}, "exactly one of --dataset_name and --train_data_dir"),
        ({"image_1_column": "rejected"}, "--image_1_column is 'rejected', but the columns of .* are jpg_0, jpg_1"),
        ({"label_column": "label"}, "--label_column is 'label', but the columns"),
        ({"caption_column": "text"}, "--caption_column is 'text', but the columns"),
        (
            {"lr_scheduler": "piecewise_constant"},
            "--lr_scheduler is 'piecewise_constant', but must be one of linear, ",
        ),
        ({"train_batch_size": 13}, "--train_batch_size 13 .* takes 13 pairs, but there are 12"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint: there is no checkpoint nowhere"),
    ],
)
@pytest.mark.bad_input
def test_bad_arguments(run_sd15, no_models, options, message):
    with pytest.raises(ValueError, match=message):
        run_sd15(**options)


@pytest.mark.bad_input
def test_validation_needs_a_prompt(run_sd15, no_models):
    with pytest.raises(ValueError, match="--run_validation needs a --validation_prompt"):
        run_sd15("--run_validation")


@pytest.mark.bad_input
def test_token_does_not_go_to_wandb(run_sd15, no_models):
    with pytest.raises(ValueError, match="--hub_token"):
        run_sd15(report_to="wandb", hub_token="secret")


@pytest.mark.bad_input
@pytest.mark.skipif(is_wandb_available(), reason="is about its absence")
def test_wandb_is_missed(run_sd15, no_models):
    with pytest.raises(ImportError, match="please install it: `pip install wandb`"):
        run_sd15(report_to="wandb")


@pytest.mark.bad_input
def test_epsilon_with_zero_terminal_snr(run_sd15, no_models):
    folder = Path(run_sd15.arguments["--pretrained_model_name_or_path"])
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    copy = run_sd15.output_dir.parent / "zero_snr"
    (copy / "scheduler").mkdir(parents=True)
    (copy / "vae").mkdir()
    (copy / "vae/config.json").write_text((folder / "vae/config.json").read_text())
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "rescale_betas_zero_snr": True}))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        run_sd15(pretrained_model_name_or_path=copy)


@pytest.mark.parametrize("label", [2.0, None, float("nan"), -1.0])
@pytest.mark.bad_input
def test_bad_label(run_sd15, no_models, tmp_path, label):
    columns = pair_columns(4)
    columns["label_0"][2] = label
    with pytest.raises(ValueError, match="Row 2: label_0 is (2.0|None|nan|-1.0), but must be 1, 0, or 0.5"):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", columns))


@pytest.mark.bad_input
def test_label_of_text(run_sd15, no_models, tmp_path):
    columns = pair_columns(4)
    columns["label_0"] = ["left"] * 5
    with pytest.raises(ValueError, match="Row 0: label_0 is 'left'"):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", columns))


@pytest.mark.bad_input
def test_missing_caption(run_sd15, no_models, tmp_path):
    columns = pair_columns(4)
    columns["caption"][3] = None
    with pytest.raises(ValueError, match="Row 3: caption is None, but must be a text"):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", columns))


@pytest.mark.bad_input
def test_only_ties(run_sd15, no_models, tmp_path):
    with pytest.raises(ValueError, match="No pair is left: .* has 5 rows, all ties"):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", pair_columns(0, num_ties=5)))


@pytest.mark.bad_input
def test_unreadable_image_in_the_first_batch(run_sd15, no_models, tmp_path):
    columns = pair_columns(2)
    columns["jpg_1"][1] = columns["jpg_1"][1][:100]
    with pytest.raises(ValueError, match=r"Row 1 \('.*'\): jpg_1 cannot be read as an image: .+"):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", columns))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.bad_input
def test_unreadable_image_later(run_sd15, tmp_path, workers):
    columns = pair_columns(12)
    bad = list(EpochSampler(list(range(12)), seed=0))[-1][1]
    columns["jpg_0"][bad] = b"no image"
    with pytest.raises(ValueError, match=rf"Row {bad} \('.*'\): jpg_0 cannot be read as an image"):
        run_sd15(
            dataset_name=parquet_of(tmp_path / "data", columns),
            loss_space="latent",
            max_train_steps=8,
            checkpointing_steps=2,
            dataloader_num_workers=workers,
        )
    assert all(weight.any() for weight in run_sd15.up_weights("checkpoint-4").values())
    assert not (run_sd15.output_dir / "checkpoint-6").exists()


def test_image_folder(checkpoints, tmp_path, caplog):
    run = Run("sd15", checkpoints["sd15"], None, tmp_path / "output")
    caplog.set_level(logging.INFO)
    folder = build_image_folder(tmp_path / "images", num_pairs=4, num_ties=2)
    run(train_data_dir=folder, loss_space="latent")
    assert all(weight.any() for weight in run.up_weights().values())
    assert "4 pairs with a winner; 2 ties are left out" in caplog.text


def test_image_folder_equals_parquet(tmp_path, parquet):
    folder = build_image_folder(tmp_path / "images")
    options = {
        "dataset_config_name": None,
        "dataset_split_name": "train",
        "cache_dir": None,
        "max_train_samples": None,
    }
    from_folder, from_parquet = (
        PreferencePairs(*load_pairs(args), args, (4, 16, 16), 1000)
        for args in (
            arguments(train_data_dir=folder, dataset_name=None, **options),
            arguments(train_data_dir=None, dataset_name=parquet, **options),
        )
    )
    for row in range(12):
        a, b = from_folder[0, row], from_parquet[0, row]
        assert all(torch.equal(x, y) for x, y in zip(images(a), images(b)))


@pytest.mark.parametrize(
    "name, message",
    [
        ("images/none.png", "row 1: jpg_0_file_name 'images/none.png' is not a file in"),
        ("../outside.png", "row 1: jpg_0_file_name '../outside.png' is not a file in"),
    ],
)
@pytest.mark.bad_input
def test_image_folder_with_a_wrong_name(run_sd15, no_models, tmp_path, name, message):
    folder = tmp_path / "images"
    build_image_folder(folder, num_pairs=3)
    picture(0).save(tmp_path / "outside.png")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1]["jpg_0_file_name"] = name
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        run_sd15(dataset_name=None, train_data_dir=folder)


@pytest.mark.bad_input
def test_image_folder_without_metadata(run_sd15, no_models, tmp_path):
    with pytest.raises(ValueError, match="--train_data_dir: there is no file .*metadata.jsonl"):
        run_sd15(dataset_name=None, train_data_dir=tmp_path)


@pytest.mark.bad_input
def test_cache_refuses_random_crop(run_sd15, no_models):
    with pytest.raises(ValueError, match="--random_crop does not go with it"):
        run_sd15("--cache_latents", "--random_crop")


@pytest.mark.bad_input
def test_streaming_needs_an_end(run_sd15, no_models):
    with pytest.raises(ValueError, match="--streaming needs a --dataset_name and --max_train_steps"):
        run_sd15("--streaming", max_train_steps=None)


def truncated(image):
    return image[: len(image) // 2]


BAD_IMAGES = {
    "truncated": truncated(pair_columns(1)["jpg_0"][0]),
    "zero bytes": b"",
    "text": b"this is no picture",
    "null": None,
    "bomb": encoded(Image.new("1", (20000, 20000))),
}


@pytest.mark.parametrize("kind_of_image", BAD_IMAGES)
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.bad_input
def test_bad_image_stops_with_row_and_column(run_sd15, tmp_path, kind_of_image, position):
    columns = pair_columns(4)
    bad = [row for _, row in EpochSampler(list(range(4)), seed=0)][0 if position == "first" else -1]
    columns["jpg_1"][bad] = BAD_IMAGES[kind_of_image]
    with pytest.raises(ValueError, match=rf"Row {bad} \('.*'\): jpg_1 cannot be read as an image: ."):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", columns), loss_space="latent", max_train_steps=4)


def test_a_substitute_has_noise_of_its_own(tmp_path):
    columns = pair_columns(3)
    columns["jpg_0"][1] = b""
    pairs = make_pairs(columns, on_bad_sample="skip")
    substitute, itself = pairs[0, 1], pairs[0, 2]
    assert substitute["rows"] == itself["rows"] == 2 and substitute["skipped"]
    assert not torch.equal(substitute["noise"], itself["noise"])


@pytest.mark.parametrize("flags", [[], ["--cache_latents"], ["--streaming"]])
@pytest.mark.bad_input
def test_bad_images_are_skipped_and_named(run_sd15, tmp_path, caplog, flags):
    caplog.set_level(logging.INFO)
    columns = pair_columns(6)
    columns["jpg_1"][2] = BAD_IMAGES["truncated"]
    columns["jpg_0"][4] = BAD_IMAGES["text"]
    run_sd15(
        *flags,
        dataset_name=parquet_of(tmp_path / "data", columns),
        on_bad_sample="skip",
        loss_space="latent",
        max_train_steps=6,
        cache_dir=tmp_path / "cache",
    )
    # A shuffled stream counts in its own order.
    first, second = (r"\d+", r"\d+") if flags == ["--streaming"] else (2, 4)
    first_caption, second_caption = (re.escape(repr(columns["caption"][row])) for row in (2, 4))
    assert re.search(rf"Row {first} \({first_caption}\): jpg_1 cannot be read as an image", caplog.text)
    assert re.search(rf"Row {second} \({second_caption}\): jpg_0 cannot be read as an image", caplog.text)
    assert "unreadable pairs were skipped" in caplog.text
    assert all(weight.any() for weight in run_sd15.up_weights().values())


def test_the_next_row_takes_a_bad_ones_place():
    columns = pair_columns(4, num_ties=0)
    columns["jpg_0"][1] = columns["jpg_0"][2] = b""
    example = make_pairs(columns, on_bad_sample="skip")[0, 1]
    assert example["rows"] == 3 and len(example["skipped"]) == 2
    columns["jpg_0"] = [b""] * 4
    with pytest.raises(ValueError, match="cannot be read as an image"):
        make_pairs(columns, on_bad_sample="skip")[0, 1]


@pytest.mark.bad_input
def test_an_image_of_one_pixel_is_an_image(run_sd15, tmp_path):
    columns = pair_columns(2)
    columns["jpg_0"] = [encoded(Image.new("RGB", (1, 1)))] * 3
    run_sd15(dataset_name=parquet_of(tmp_path / "data", columns), loss_space="latent", max_train_steps=1)
    assert run_sd15.lora()


@pytest.mark.parametrize("caption", ["", "word " * 2000, "🐈‍⬛ 在 sofa"])
@pytest.mark.bad_input
def test_any_text_is_a_caption(run_sd15, tmp_path, caption):
    columns = pair_columns(2)
    columns["caption"] = [caption] * 3
    run_sd15(dataset_name=parquet_of(tmp_path / "data", columns), loss_space="latent", max_train_steps=1)
    assert run_sd15.lora()


@pytest.mark.bad_input
def test_a_list_is_no_caption(run_sd15, no_models, tmp_path):
    columns = pair_columns(2)
    columns["caption"] = [["a", "b"]] * 3
    with pytest.raises(ValueError, match=r"Row 0: caption is \['a', 'b'\], but must be a text"):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", columns))


@pytest.mark.parametrize("flags", [[], ["--streaming"]])
@pytest.mark.bad_input
def test_empty_dataset(run_sd15, no_models, tmp_path, flags):
    columns = {name: values[:0] for name, values in pair_columns(1).items()}
    with pytest.raises(ValueError, match='No pair is left|"train" corresponds to no data'):
        run_sd15(*flags, dataset_name=parquet_of(tmp_path / "data", columns))


@pytest.mark.bad_input
def test_one_pair_has_no_error_scale(run_sd15, tmp_path):
    options = {"dataset_name": parquet_of(tmp_path / "data", pair_columns(1)), "train_batch_size": 1}
    with pytest.raises(
        RuntimeError, match="spread is nan in latent space .* Give --ncp_error_scale, or more than one"
    ):
        run_sd15(**options)
    run_sd15(ncp_error_scale=1, **options)
    assert run_sd15.lora()


@pytest.mark.bad_input
def test_one_pair_and_a_batch_of_four(run_sd15, no_models, tmp_path):
    with pytest.raises(ValueError, match="--train_batch_size 4 .* takes 4 pairs, but there are 1"):
        run_sd15(dataset_name=parquet_of(tmp_path / "data", pair_columns(1)), train_batch_size=4)


def test_a_file_may_occur_in_several_pairs(checkpoints, tmp_path):
    folder = tmp_path / "images"
    build_image_folder(folder, num_pairs=3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["jpg_0_file_name"] = rows[0]["jpg_0_file_name"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = Run("sd15", checkpoints["sd15"], None, tmp_path / "output")
    run(train_data_dir=folder, loss_space="latent", max_train_steps=1)


@pytest.mark.parametrize("loss_space", ["latent", "ncp"])
def test_cached_training_equals_uncached(run, tmp_path, loss_space):
    losses = []
    for flags in ([], ["--cache_latents"]):
        run.output_dir = run.arguments["--output_dir"] = tmp_path / f"output{len(flags)}"
        # β multiplies rounding, and Adam's first steps are its signs: both are kept from it.
        options = {
            "loss_type": "cpo",
            "beta_dpo": 1,
            "learning_rate": 0,
            "max_train_steps": 6,
            "ncp_error_scale": 3000,
        }
        run(*flags, loss_space=loss_space, cache_dir=tmp_path / "cache", **options)
        losses.append(run.scalars("loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 6


def test_half_precision_cache(run, tmp_path):
    losses = []
    for flags in ([], ["--cache_latents"]):
        run.output_dir = run.arguments["--output_dir"] = tmp_path / f"output{len(flags)}"
        run(*flags, loss_space="latent", loss_type="sft", mixed_precision="bf16", cache_dir=tmp_path / "cache")
        losses.append(run.scalars("loss"))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def cache_folders(tmp_path):
    return sorted((tmp_path / "cache/ncp_dpo").iterdir())


def test_cache_is_reused_only_where_nothing_changed(run_sd15, checkpoints, tmp_path, monkeypatch):
    captions, pictures = [], []
    encode_prompt, encode_images = train_ncp_dpo_sd15.encode_prompt, train_ncp_dpo_sd15.encode_images

    def count_captions(components, batch):
        captions.extend(batch)
        return encode_prompt(components, batch)

    def count_images(vae, pixel_values, batch_size):
        pictures.append(len(pixel_values))
        return encode_images(vae, pixel_values, batch_size)

    monkeypatch.setattr(train_ncp_dpo_sd15, "encode_prompt", count_captions)
    monkeypatch.setattr(train_ncp_dpo_sd15, "encode_images", count_images)
    columns = pair_columns(4)
    columns["caption"] = ["the same"] * 5
    data = parquet_of(tmp_path / "data", columns)
    number = itertools.count()

    def train(**options):
        captions.clear()
        pictures.clear()
        run_sd15.output_dir = run_sd15.arguments["--output_dir"] = tmp_path / f"output-{next(number)}"
        flags = options.pop("flags", [])
        options = {"dataset_name": data, "loss_space": "latent", "max_train_steps": 1, **options}
        run_sd15("--cache_latents", *flags, cache_dir=tmp_path / "cache", **options)
        return len(captions), sum(pictures)

    assert train() == (1, 4 * 2 * 2)
    assert train() == (0, 0)
    assert train(seed=5, learning_rate=1e-5) == (0, 0)
    assert train(flags=["--no_hflip"]) == (1, 4 * 2)
    assert train(resolution=16) == (1, 4 * 2 * 2)
    assert train(mixed_precision="bf16") == (1, 4 * 2 * 2)
    assert train(loss_type="sft") == (1, 4 * 2)
    assert train(pretrained_model_name_or_path=checkpoints["sd2"]) == (0, 0)  # the same VAE and text encoder
    assert train(image_0_column="jpg_1", image_1_column="jpg_0") == (1, 4 * 2 * 2)
    Dataset.from_dict({**columns, "caption": ["another"] * 5}).to_parquet(str(data / "train.parquet"))
    assert train() == (1, 4 * 2 * 2)
    assert len(cache_folders(tmp_path)) == 7


def test_cache_notices_a_changed_file(checkpoints, tmp_path):
    folder = tmp_path / "images"
    build_image_folder(folder, num_pairs=2)
    run = Run("sd15", checkpoints["sd15"], None, tmp_path / "output")
    options = {"train_data_dir": folder, "loss_space": "latent", "max_train_steps": 1, "cache_dir": tmp_path / "cache"}
    run("--cache_latents", **options)
    picture(99).save(folder / "images/0_jpg_0.png")
    run.output_dir = run.arguments["--output_dir"] = tmp_path / "second"
    run("--cache_latents", **options)
    assert len(cache_folders(tmp_path)) == 2


def test_an_interrupted_cache_goes_on(run_sd15, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ncp_dpo_sd15, "CACHE_CHUNK", 4)
    encode_images = train_ncp_dpo_sd15.encode_images
    pictures = []

    def interrupt(vae, pixel_values, batch_size):
        if len(pictures) == 6:
            raise KeyboardInterrupt
        pictures.append(1)
        return encode_images(vae, pixel_values, batch_size)

    options = {"loss_space": "latent", "max_train_steps": 1, "cache_dir": tmp_path / "cache"}
    monkeypatch.setattr(train_ncp_dpo_sd15, "encode_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_sd15("--cache_latents", **options)
    pictures[:] = [0]
    monkeypatch.setattr(train_ncp_dpo_sd15, "encode_images", lambda *a: (pictures.append(1), encode_images(*a))[1])
    run_sd15("--cache_latents", **options)
    assert sum(pictures) == 8  # of 12 pairs the first 4 were stored


@pytest.mark.bad_input
def test_a_cache_on_another_machine_is_missed(tmp_path):
    second = SimpleNamespace(process_index=1, num_processes=2, wait_for_everyone=lambda: None)
    with pytest.raises(ValueError, match="row-3-0.arrow is on another machine: give a --cache_dir that all machines"):
        train_ncp_dpo_sd15.map_in_chunks(second, tmp_path, "row", list(range(5)), lambda batch: {}, 1)


def test_processes_share_a_small_cache(tmp_path):
    seen = []

    def encode(batch):
        seen.append((process.process_index, *batch["row"]))
        return {"encoded": batch["row"]}

    for index in (0, 1):
        process = SimpleNamespace(process_index=index, num_processes=2, wait_for_everyone=lambda: None)
        # The first misses what the second has not stored yet.
        with contextlib.nullcontext() if index else pytest.raises(ValueError):
            stored = train_ncp_dpo_sd15.map_in_chunks(process, tmp_path, "row", list(range(5)), encode, 1)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]
    assert stored["row"] == stored["encoded"] == list(range(5))


def test_validation_with_a_cache(run, tmp_path):
    options = {"validation_prompt": "a picture", "num_validation_images": 1, "cache_dir": tmp_path / "cache"}
    run("--cache_latents", "--run_validation", loss_space="latent", mixed_precision="bf16", **options)
    pictures = [np.asarray(Image.open(run.output_dir / f"validation/step-{step}.png")) for step in (0, 2)]
    assert pictures[0].std() > 0 and not np.array_equal(*pictures)


def test_cached_models_leave_memory(run_sd15, tmp_path, monkeypatch):
    kept = []
    training_step = train_ncp_dpo_sd15.training_step

    def spy(*args):
        gc.collect()
        kept.append(sum(isinstance(thing, (AutoencoderKL, CLIPTextModel)) for thing in gc.get_objects()))
        return training_step(*args)

    gc.collect()
    before = sum(isinstance(thing, (AutoencoderKL, CLIPTextModel)) for thing in gc.get_objects())
    monkeypatch.setattr(train_ncp_dpo_sd15, "training_step", spy)
    run_sd15("--cache_latents", loss_space="latent", max_train_steps=1, cache_dir=tmp_path / "cache")
    assert kept == [before]


def rows_of_stream(parquet, rank, processes, workers, tmp_path):
    args = arguments(
        dataset_name=parquet,
        train_data_dir=None,
        dataset_config_name=None,
        dataset_split_name="train",
        cache_dir=None,
        max_train_samples=None,
        streaming=True,
        shuffle_buffer_size=4,
        train_batch_size=1,
        dataloader_num_workers=workers,
    )
    dataset = split_dataset_by_node(load_pairs(args)[0], rank, processes)
    pairs = train_ncp_dpo_sd15.StreamedPairs(dataset, None, args, (4, 16, 16), 1000)
    return [batch["captions"][0] for batch in itertools.islice(train_ncp_dpo_sd15.create_dataloader(args, pairs), 12)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 4])
def test_streaming_reads_every_pair_once(tmp_path, shards, workers):
    (tmp_path / "data").mkdir()
    dataset = Dataset.from_dict(pair_columns(12, num_ties=0))
    for shard in range(shards):
        dataset.shard(shards, shard).to_parquet(str(tmp_path / f"data/train-{shard}.parquet"))
    once = rows_of_stream(str(tmp_path / "data"), 0, 1, workers, tmp_path)
    assert len(set(once)) == 12
    halves = [rows_of_stream(str(tmp_path / "data"), rank, 2, workers, tmp_path)[:6] for rank in range(2)]
    assert len(set(halves[0] + halves[1])) == 12
    assert once != sorted(once, key=lambda caption: int(caption.split()[-1]))


@pytest.mark.bad_input
def test_streamed_label_and_image_are_checked(run_sd15, no_models, tmp_path):
    columns = pair_columns(4)
    columns["label_0"][0] = 3.0
    with pytest.raises(ValueError, match="label_0 is 3.0, but must be 1, 0, or 0.5"):
        run_sd15("--streaming", dataset_name=parquet_of(tmp_path / "data", columns), train_batch_size=4)


def test_max_train_samples(parquet):
    args = arguments(
        train_data_dir=None,
        dataset_name=parquet,
        dataset_config_name=None,
        dataset_split_name="train",
        cache_dir=None,
        max_train_samples=5,
    )
    assert load_pairs(args)[1] == [0, 1, 2, 3, 4]
