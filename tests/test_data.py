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

import argparse
import base64
import hashlib
import io
import json
import logging
import os
import re
import signal
import struct
import warnings
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import preference_pairs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import PartialState
from conftest import Run, start_script
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from preference_pairs import (
    COUNT,
    INDEX,
    NOT_NEGATIVE,
    POSITIVE,
    PreferencePairs,
    collate_fn,
    create_dataloader,
    find_rows,
    image_bytes,
    load_dataset,
    number_type,
    pair_stream,
    preprocess_image,
    read_image,
)
from tiny_checkpoints import build_image_folder, encoded, pair_columns, picture, write_parquet
from train_ncp_dpo_sd15 import create_parser, encode_images


def arguments(**options):
    args = create_parser().parse_args(["--pretrained_model_name_or_path", "none", "--resolution", "32", "--seed", "0"])
    vars(args).update(options)
    return args


def make_pairs(columns, winner_only=False, **options):
    args = arguments(**options)
    dataset = Dataset.from_dict(columns).cast(preference_pairs.pair_features(args))
    rows, timesteps = list(range(len(dataset))), torch.arange(1000)
    return PreferencePairs(dataset, rows, args, (4, 16, 16), timesteps, winner_only)


def load_pairs(**options):
    args = arguments(**options)
    dataset = load_dataset(args)
    return PreferencePairs(dataset, find_rows(args, dataset), args, (4, 16, 16), torch.arange(1000), False)


def images(example):
    """The images of a pair, from -1 to 1."""
    return [image["pixel_values"] / 127.5 - 1 for image in example["images"]]


@pytest.fixture(autouse=True)
def accelerate_state():
    """What the scripts' functions log through, when a test calls them without `main`."""
    PartialState()


# Flags


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-1"])
@pytest.mark.parametrize(
    "convert", [COUNT, INDEX, POSITIVE, NOT_NEGATIVE, number_type(float, "any number", lambda value: value != -1)]
)
@pytest.mark.bad_input
def test_numbers_of_flags_are_finite(convert, text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError), match=text):
        convert(text)


# From a row to the batch


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
    assert len(images(make_pairs(columns, winner_only=True)[0, 0])) == 1


def test_collate_puts_winners_before_losers():
    pairs = make_pairs(pair_columns(3))
    batch = collate_fn([pairs[0, row] for row in range(3)])
    assert batch["pixel_values"].shape == (6, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
    winners, losers = batch["pixel_values"].float().chunk(2)
    assert (winners.mean(dim=(1, 2, 3)) > losers.mean(dim=(1, 2, 3))).all()
    assert batch["noise"].shape == (3, 4, 16, 16) and batch["timesteps"].shape == (3,)
    assert batch["caption"] == [f"picture number {row}" for row in range(3)]


def test_workers_ignore_the_signals_that_stop_their_trainer():
    """They come to the whole process group, and the trainer still needs the batch that it waits for."""
    pairs = make_pairs(pair_columns(4), dataloader_num_workers=1, train_batch_size=1)
    batches = iter(create_dataloader(pairs.args, pairs, 0, 12))
    next(batches)
    (worker,) = torch.multiprocessing.active_children()
    for stop_signal in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, stop_signal)
    assert len(list(batches)) == 11


def test_sdxl_time_ids_are_each_images_own():
    columns = {
        "jpg_0": [encoded(picture(0, size=(64, 48)))],
        "jpg_1": [encoded(picture(1, size=(40, 80)))],
        "label_0": [0.0],
        "caption": ["x"],
    }
    pairs = make_pairs(columns)
    time_ids = collate_fn([pairs[0, 0]])["time_ids"]
    # Height, width, top, left, and twice the resolution; resized to 32 x 64 and 43 x 32, cropped in the middle.
    assert time_ids.tolist() == [[80, 40, 16, 0, 32, 32], [48, 64, 0, 6, 32, 32]]


def test_the_stream_of_pairs():
    rows = [5, 6, 7, 8, 9, 11]
    stream = list(pair_stream(rows, 0, 0, 14))
    assert stream == list(pair_stream(rows, 0, 0, 14)) and len(list(pair_stream(rows, 0, 3, 14))) == 11
    assert [epoch for epoch, _ in stream] == [0] * 6 + [1] * 6 + [2] * 2
    first, second = ([row for _, row in stream[start : start + 6]] for start in (0, 6))
    assert sorted(first) == sorted(second) == rows and first != second
    # A part of the stream is the same wherever it starts, also across epochs.
    assert list(pair_stream(rows, 0, 4, 13)) == stream[4:13]
    assert list(pair_stream(rows, 1, 0, 6)) != stream[:6]


def test_resize_keeps_the_aspect_ratio():
    image = Image.new("RGB", (100, 50))
    image.paste("white", (25, 0, 75, 50))
    tensors = preprocess_image(image, arguments(), (0.5, 0.5), flip=False)
    pixel_values = tensors["pixel_values"]
    assert tensors["time_ids"].tolist() == [50, 100, 0, 16, 32, 32] and pixel_values.shape == (3, 32, 32)
    assert pixel_values[:, :, 2:-2].min() > 240


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
    result = read_image(path.read_bytes())
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
    assert read_image((tmp_path / "image.jpg").read_bytes()).size == (10, 20)


def tiff(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


def test_greys_of_more_than_8_bits():
    grey = np.asarray(picture(1).convert("L"))
    for values in (grey.astype(np.float32) / 255, grey.astype(np.int32), grey.astype(np.int32) * 257):
        assert np.abs(np.asarray(read_image(tiff(values)))[..., 0].astype(int) - grey).max() <= 1
    # 12 bits in 16 stay what the file says they are.
    dark = np.asarray(read_image(tiff(grey.astype(np.uint16) * 16)))[..., 0]
    assert np.abs(dark.astype(float) - grey / 16).max() <= 1


@pytest.mark.parametrize(
    "values, message",
    [
        (np.full((8, 8), 7.5, np.float32), "its values are 7.5 to 7.5, but must be from 0 to 1"),
        (np.full((8, 8), np.nan, np.float32), "its values are nan to nan, but must be from 0 to 1"),
        (np.full((8, 8), -1, np.int32), "its values are -1 to -1, but must be from 0 to 255"),
        (np.full((8, 8), 70_000, np.int32), "its values are 70000 to 70000, but must be from 0 to 65535"),
    ],
)
@pytest.mark.bad_input
def test_greys_that_say_nothing_are_refused_with_their_row(values, message):
    columns = pair_columns(3)
    columns["jpg_0"][1] = tiff(values)
    with pytest.raises(
        ValueError, match=rf"Row 1 \('picture number 1'\): jpg_0 cannot be read as an image: {message}"
    ):
        make_pairs(columns)[0, 1]


# Colours, metadata and shapes


def saved(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image).astype(int)


def difference(data, image):
    """The mean difference, of 255, of what is read from `data` from an image."""
    return np.abs(pixels(read_image(data)) - pixels(image)).mean()


def fixed_point(*values):
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def gamma_curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def build_profile(space, tags, name="x"):
    """An ICC profile of version 2. `tags` are added to those that every profile has."""
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed_point(0.9642, 1, 0.8249),
        **tags,
    }
    body, table, offset = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(value))
        body += value
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    head = struct.pack(">I4s4s4s4s4s", offset + len(body), b"none", b"\2\x40\0\0", b"mntr", space, pcs)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + fixed_point(0.9642, 1, 0.8249) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def rgb_profile(primaries, curve, name="x"):
    """A profile of these primaries, as XYZ under D50."""
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)
    tags = {tag: b"XYZ \0\0\0\0" + fixed_point(*column) for tag, column in columns}
    return build_profile(b"RGB ", {**tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)}, name)


SRGB_PRIMARIES = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)
PROFILES = {
    "Adobe RGB": rgb_profile(
        ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), gamma_curve(2.2)
    ),
    "Display P3": rgb_profile(
        ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), gamma_curve(2.2)
    ),
    "ProPhoto": rgb_profile(
        ((0.79767, 0.28804, 0), (0.13519, 0.71188, 0), (0.03134, 0.00009, 0.82491)), gamma_curve(1.8)
    ),
    "linear sRGB": rgb_profile(SRGB_PRIMARIES, gamma_curve(1), "sRGB with linear values"),
}
# The curve of sRGB in 1024 points.
LEVELS = np.arange(1024) / 1023
LEVELS = 65535 * np.where(LEVELS <= 0.04045, LEVELS / 12.92, ((LEVELS + 0.055) / 1.055) ** 2.4)
SRGB_CURVE = b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *LEVELS.round().astype(int))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P with transparency"])
@pytest.mark.parametrize("name", PROFILES)
def test_colours_of_a_profile_become_srgb(name, mode):
    profile = ImageCms.ImageCmsProfile(io.BytesIO(PROFILES[name]))
    stored = ImageCms.profileToProfile(picture(3), ImageCms.createProfile("sRGB"), profile)
    options = {"icc_profile": PROFILES[name]}
    if mode == "RGBA":
        stored.putalpha(Image.linear_gradient("L").resize(stored.size))
    elif mode.startswith("P"):
        stored = stored.quantize(64)
    if "transparency" in mode:
        options["transparency"] = bytes([0, 100, 200, *[255] * 61])
    alpha = Image.open(io.BytesIO(saved(stored, **options))).convert("RGBA").getchannel("A")
    image = ImageCms.profileToProfile(stored.convert("RGBA").convert("RGB"), profile, ImageCms.createProfile("sRGB"))
    image.putalpha(alpha)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert difference(saved(stored, **options), image) == 0
    assert difference(saved(stored, **{**options, "icc_profile": None}), image) > 3


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_greys_of_a_profile_become_srgb(mode):
    profile, grey = build_profile(b"GRAY", {b"kTRC": gamma_curve(1)}), picture(3).convert("L")
    linear = pixels(grey) / 255
    expected = 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    if mode == "I;16":
        grey = Image.fromarray((pixels(grey) * 257).astype(np.uint16))
    if mode == "LA":
        grey = grey.convert("LA")
        grey.paste((0, 0), (0, 0, 10, 48))
        expected[:, :10] = 255
    assert np.abs(pixels(read_image(saved(grey, icc_profile=profile))) - expected[..., None]).max() < 1


def cmyk_profile():
    """The profile of a device whose cyan ink is red and whose magenta ink is grey."""
    colours = {(0, 0, 0, 0): [255, 128, 128], (1, 0, 0, 0): [128, 208, 195], (0, 1, 0, 0): [128, 128, 128]}
    grid = [value for inks in np.ndindex(2, 2, 2, 2) for value in colours.get(inks, [0, 128, 128])]
    identity = fixed_point(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + bytes(grid) + bytes(range(256)) * 3
    )
    return build_profile(b"CMYK", {b"A2B0": table})


def test_cmyk_of_a_profile_becomes_srgb():
    image = Image.new("CMYK", (24, 8))
    image.paste((0, 255, 0, 0), (8, 0, 16, 8))
    image.paste((255, 0, 0, 0), (16, 0, 24, 8))
    white, grey, red = pixels(read_image(saved(image, "TIFF", icc_profile=cmyk_profile())))[4, 4::8]
    assert white.min() > 250 and np.abs(grey - 119).max() <= 3 and red[0] > 200 and red[1:].max() < 100
    plain = pixels(read_image(saved(image, "TIFF")))[4, 4::8]
    assert plain.tolist() == [[255, 255, 255], [255, 0, 255], [0, 255, 255]]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_profile_of_srgb_changes_nothing(mode):
    image = picture(3).convert(mode)
    # The second one's name does not say that it is sRGB.
    for profile in (SRGB, rgb_profile(SRGB_PRIMARIES, SRGB_CURVE)):
        changes = pixels(read_image(saved(image, icc_profile=profile))) - pixels(read_image(saved(image)))
        assert np.abs(changes).max() <= 1


@pytest.mark.parametrize(
    "mode, profile",
    [("RGB", bytes(2_000_000)), ("RGB", b"x"), ("CMYK", SRGB), ("RGB", cmyk_profile())],
    ids=["zeros", "cut off", "of another mode", "of CMYK"],
)
@pytest.mark.bad_input
def test_an_unusable_profile_is_a_warning(mode, profile):
    image = picture(3).convert(mode)
    with pytest.warns(UserWarning, match="colour profile"):
        data = saved(image, "PNG" if mode == "RGB" else "TIFF", icc_profile=profile)
        assert difference(data, image.convert("RGB")) == 0


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "many chunks"])
@pytest.mark.bad_input
def test_much_text_in_a_png_does_not_matter(kind):
    info, text = PngInfo(), json.dumps({"nodes": ["x" * 50] * 40_000})
    if kind == "iTXt":
        info.add_itxt("workflow", text, zip=True)
    for number in range({"tEXt": 1, "zTXt": 1, "iTXt": 0, "many chunks": 40}[kind]):
        info.add_text(f"workflow {number}", text, zip=kind != "tEXt")
    assert difference(saved(picture(1), pnginfo=info), picture(1)) == 0


def animation(file_format):
    return saved(picture(0), file_format, save_all=True, append_images=[picture(1)])


@pytest.mark.parametrize(
    "data, message",
    [
        (animation("GIF"), "an animation"),
        (animation("PNG"), "an animation"),
        (animation("WEBP"), "an animation"),
        (saved(Image.new("RGB", (100_000, 10))), "100000x10 pixels, .* 32 times"),
        (saved(Image.new("L", (3, 97))), "3x97 pixels, .* 32 times"),
    ],
)
@pytest.mark.bad_input
def test_animations_and_extreme_shapes_are_refused_with_their_row(data, message):
    columns = pair_columns(3)
    columns["jpg_1"][2] = data
    with pytest.raises(ValueError, match=rf"Row 2 .*jpg_1 cannot be read as an image: {message}"):
        make_pairs(columns)[0, 2]


def test_single_pictures_in_formats_of_several():
    for file_format in ("GIF", "WEBP"):
        data = saved(picture(0), file_format, lossless=True)
        assert difference(data, Image.open(io.BytesIO(data)).convert("RGB")) == 0
    # A photograph may hold a preview, and a TIFF further pages. The first is the picture.
    for file_format in ("MPO", "TIFF"):
        data = animation(file_format)
        assert difference(data, Image.open(io.BytesIO(data)).convert("RGB")) == 0
    assert read_image(saved(Image.new("RGB", (96, 3)))).size == (96, 3)


@pytest.mark.bad_input
def test_base64_instead_of_an_image():
    columns = pair_columns(3)
    columns["jpg_1"][2] = base64.b64encode(columns["jpg_1"][2])
    with pytest.raises(
        ValueError, match=r"Row 2 .*'iVBORw0KGgoAAAANSUhE'... is text instead of an image; decode base64 first"
    ):
        make_pairs(columns)[0, 2]
    with pytest.raises(ValueError, match="is text instead of an image; decode base64 first"):
        image_bytes(arguments(dataset_name="none"), {"bytes": None, "path": "iVBORw0KGgoAAAANSUhE" * 100})


@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0MX\0*\0\0\0\x08"])
@pytest.mark.bad_input
def test_metadata_that_cannot_be_parsed_is_ignored_with_one_warning(exif):
    data = saved(picture(0), exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        sizes = [read_image(data).size for _ in range(3)]
    assert sizes == [picture(0).size] * 3
    assert ["The metadata of an image cannot be parsed" in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize("where", ["absolute", "above", "link"])
@pytest.mark.bad_input
def test_datasets_read_no_file_outside_their_folder(tmp_path, where):
    secret, folder = tmp_path / "secret.png", tmp_path / "data"
    picture(0).save(secret)
    path = {"absolute": str(secret), "above": "../secret.png", "link": "link.png"}[where]
    features = Features(
        {"jpg_0": ImageFeature(), "jpg_1": ImageFeature(), "label_0": Value("float64"), "caption": Value("string")}
    )
    columns = pair_columns(2)
    columns["jpg_0"] = [{"bytes": None, "path": path}] * 3
    columns["jpg_1"] = [{"bytes": image, "path": None} for image in columns["jpg_1"]]
    table = pa.table(
        {name: pa.array(values, features.arrow_schema.field(name).type) for name, values in columns.items()}
    )
    folder.mkdir()
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), folder / "train.parquet")
    os.symlink(secret, folder / "link.png")
    pairs = load_pairs(dataset_name=str(folder))
    with pytest.raises(ValueError, match=r"Row 0 .*jpg_0 cannot be read as an image: .*leads out of .*data"):
        pairs[0, 0]


def test_paths_below_the_data_are_read(tmp_path):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    (folder / "images").mkdir(parents=True)
    cache.mkdir()
    for path in (folder / "images/a.png", cache / "b.png"):
        picture(0).save(path)
    os.symlink(folder / "images/a.png", folder / "link.png")
    for path in ("images/a.png", "link.png", str(folder / "images/a.png")):
        data = image_bytes(arguments(dataset_name=str(folder)), {"bytes": None, "path": path})
        assert data == (folder / "images/a.png").read_bytes()
    # What a dataset of the hub was unpacked to.
    hub = arguments(dataset_name="somebody/pairs", cache_dir=str(cache))
    assert read_image(image_bytes(hub, {"bytes": None, "path": str(cache / "b.png")})).size == picture(0).size
    with pytest.raises(ValueError, match="a.png leads out of .*cache"):
        image_bytes(hub, {"bytes": None, "path": str(folder / "images/a.png")})


@pytest.mark.bad_input
def test_a_hub_dataset_reads_no_token(tmp_path, monkeypatch):
    """The user's token is beside the caches of hub and datasets."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(preference_pairs, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = arguments(dataset_name="somebody/pairs")
    for name in ("datasets/a.png", "hub/a.png"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(name.encode())
        assert image_bytes(hub, {"bytes": None, "path": str(path)}) == name.encode()
    for name in ("token", "stored_tokens", "datasets/../token"):
        with pytest.raises(ValueError, match=f"{name} leads out of .*datasets"):
            image_bytes(hub, {"bytes": None, "path": str(tmp_path / name)})


@pytest.mark.bad_input
def test_image_folders_read_no_file_outside(tmp_path):
    folder = Path(build_image_folder(tmp_path / "images", num_pairs=2))
    picture(0).save(tmp_path / "secret.png")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["jpg_0_file_name"] = "../secret.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"Row 0 .*\.\./secret.png leads out of .*images"):
        load_pairs(train_data_dir=str(folder))[0, 0]


@pytest.mark.bad_input
def test_image_folders_name_what_is_not_there(run_sd15, no_models, tmp_path):
    folder = Path(build_image_folder(tmp_path / "images", num_pairs=2))
    edit_metadata(folder, lambda rows: [json.dumps({**row, "jpg_0_file_name": "images/none.png"}) for row in rows])
    with pytest.raises(ValueError, match=r"Row 0: jpg_0 is 'images/none.png', which is no file in .*images"):
        run_sd15(dataset_name=None, train_data_dir=folder)
    edit_metadata(folder, lambda rows: [json.dumps({**row, "jpg_0_file_name": 5000 * "A"}) for row in rows])
    with pytest.raises(ValueError, match=r"Row 0: jpg_0 is 'AAAA.*, which is no file in .*images"):
        run_sd15(dataset_name=None, train_data_dir=folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="--train_data_dir: there is no file .*metadata.jsonl"):
        run_sd15(dataset_name=None, train_data_dir=folder)


def edit_metadata(folder, edit):
    path = Path(folder, "metadata.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    path.write_text("\n".join(edit(rows)), encoding="utf-8-sig")


def test_no_type_is_guessed_from_the_lines_before(tmp_path):
    folder = build_image_folder(tmp_path / "images", num_pairs=6)
    # A byte order mark, dates as captions, and the first tie after megabytes of integers.
    edit_metadata(
        folder,
        lambda rows: [
            json.dumps(
                {**rows[i % 6], "label_0": 0.5 if i == 499 else int(rows[i % 6]["label_0"]), "caption": caption}
            )
            for i, caption in enumerate(["2024-01-01"] * 6 + ["x" * 10_000] * 494)
        ],
    )
    pairs = load_pairs(train_data_dir=folder)
    assert len(pairs.rows) == 499 and pairs[0, 0]["caption"] == "2024-01-01"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'caption': 1}", "line 4: Expecting property name"),
        ('"a text"', "line 4: "),
        (
            '{"label_0": 1, "caption": "x", "jpg_0_file_name": "x.png"}',
            "line 4: has no 'jpg_1_file_name', but label_0",
        ),
        ({"label_0": "left"}, "line 4: .*'left'"),
        ({"caption": 7}, "line 4: .*got a 'int' object"),
        ({"caption": "bad \ud83d emoji"}, "line 4: .*surrogates not allowed"),
    ],
)
@pytest.mark.bad_input
def test_lines_are_named(tmp_path, line, message):
    folder = build_image_folder(tmp_path / "images", num_pairs=6)
    edit_metadata(
        folder,
        lambda rows: [
            *map(json.dumps, rows[:3]),
            line if isinstance(line, str) else json.dumps({**rows[3], **line}),
            *map(json.dumps, rows[4:]),
        ],
    )
    with pytest.raises(ValueError, match=f"metadata.jsonl, {message}"):
        load_pairs(train_data_dir=folder)


def test_shards_of_integers_and_decimals_are_one_dataset(tmp_path):
    labels = [[1, 0, 1], [1.0, 0.5, 0.0], [Decimal("1.0"), Decimal("0.5"), Decimal("0.0")]]
    for shard, values in enumerate(labels):
        columns = {name: column[:3] for name, column in pair_columns(3).items()}
        # A column that training does not read may be broken.
        table = pa.table({**columns, "label_0": pa.array(values), "mask": [b"broken"] * 3})
        pq.write_table(table, tmp_path / f"train-{shard}.parquet")
    assert load_pairs(dataset_name=str(tmp_path)).rows == [0, 1, 2, 3, 5, 6, 8]


def test_a_column_of_broken_images_that_is_not_used(run_sd15, tmp_path):
    columns = pair_columns(6)
    features = Features(
        {
            "jpg_0": Value("binary"),
            "jpg_1": Value("binary"),
            "label_0": Value("float64"),
            "caption": Value("string"),
            "mask": ImageFeature(),
        }
    )
    columns["mask"] = [{"bytes": b"broken", "path": None}] * len(columns["caption"])
    run_sd15(dataset_name=write_parquet(tmp_path / "data", columns, features), loss_space="latent")
    assert all(weight.any() for weight in run_sd15.up_weights().values())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"label_0": ["left"] * 3},
            r"train-1.parquet column label_0 \(--label_column\) is of type string, but must hold num",
        ),
        ({"caption": [["a"]] * 3}, r"train-1.parquet column caption \(--caption_column\) is of type list"),
        (
            {"jpg_1": [7] * 3},
            r"train-1.parquet column jpg_1 \(--image_1_column\) is of type int64, but must hold images",
        ),
        ({"caption": None}, r"train-1.parquet has no column 'caption' \(--caption_column\): there are jpg_0, jpg_1"),
    ],
)
@pytest.mark.bad_input
def test_shards_of_another_kind_are_named(tmp_path, change, message):
    for shard in range(2):
        columns = {name: column[:3] for name, column in pair_columns(3).items()}
        columns = {**columns, **(change if shard else {})}
        columns = {name: column for name, column in columns.items() if column is not None}
        pq.write_table(pa.table(columns), tmp_path / f"train-{shard}.parquet")
    with pytest.raises(ValueError, match=f"--dataset_name .* cannot be read: .*{message}"):
        load_pairs(dataset_name=str(tmp_path))


@pytest.mark.bad_input
def test_a_folder_with_a_script_is_named(tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text("")
    with pytest.raises(ValueError, match=f"--dataset_name {tmp_path} cannot be read: .*{tmp_path.name}.py"):
        load_pairs(dataset_name=str(tmp_path))


@pytest.mark.bad_input
def test_a_damaged_shard_is_named(tmp_path):
    Dataset.from_dict(pair_columns(3)).to_parquet(str(tmp_path / "train-0.parquet"))
    (tmp_path / "train-1.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="--dataset_name .* cannot be read: .*train-1.parquet .*arquet"):
        load_pairs(dataset_name=str(tmp_path))


@pytest.mark.bad_input
def test_dataset_names_of_another_kind(run_sd15, parquet, tmp_path, no_models):
    with pytest.raises(
        ValueError, match="--dataset_name .*train.parquet cannot be read: it is a file: give the folder"
    ):
        run_sd15(dataset_name=f"{parquet}/train.parquet")
    load_pairs(dataset_name=parquet, dataset_split_name="all")
    with pytest.raises(ValueError, match=r"its splits \(--dataset_split_name\) are train, not test"):
        run_sd15(dataset_split_name="test")
    with pytest.raises(ValueError, match=r"its splits \(--dataset_split_name\) are train, not train\+test"):
        run_sd15(dataset_split_name="train+test")
    Dataset.from_dict(pair_columns(3)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="was written by save_to_disk: write it with to_parquet instead"):
        run_sd15(dataset_name=tmp_path / "saved")
    assert len(load_pairs(dataset_name=parquet, dataset_split_name="train[:4]").rows) == 4


def test_pixels_are_normalised_where_they_are_encoded():
    class Vae:
        device, dtype, config = "cpu", torch.float32, SimpleNamespace(scaling_factor=2.0)

        def encode(self, pixels):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))

    pixel_values = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    torch.testing.assert_close(encode_images(Vae(), pixel_values, 2).flatten(), torch.tensor([-2.0, -1.2, 2.0]))


@pytest.mark.parametrize("label", [2.0, None, float("nan"), -1.0])
@pytest.mark.bad_input
def test_bad_label(run_sd15, no_models, tmp_path, label):
    columns = pair_columns(4)
    columns["label_0"][2] = label
    with pytest.raises(
        ValueError, match="Row 2: the label is (2.0|None|nan|-1.0), but must be 1, 0, or 0.5 for a tie"
    ):
        run_sd15(dataset_name=write_parquet(tmp_path / "data", columns))


@pytest.mark.bad_input
def test_missing_caption(run_sd15, no_models, tmp_path):
    columns = pair_columns(4)
    columns["caption"][3] = None
    with pytest.raises(ValueError, match="Row 3: the caption is null, but must be a text"):
        run_sd15(dataset_name=write_parquet(tmp_path / "data", columns))


@pytest.mark.bad_input
def test_only_ties(run_sd15, no_models, tmp_path):
    with pytest.raises(ValueError, match="all 5 rows are ties"):
        run_sd15(dataset_name=write_parquet(tmp_path / "data", pair_columns(0, num_ties=5)))


@pytest.mark.bad_input
def test_unreadable_image_in_the_first_batch(run_sd15, no_models, tmp_path):
    columns = pair_columns(2)
    columns["jpg_1"][1] = columns["jpg_1"][1][:100]
    with pytest.raises(ValueError, match=r"Row 1 \('.*'\): jpg_1 cannot be read as an image: .+"):
        run_sd15(dataset_name=write_parquet(tmp_path / "data", columns))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.bad_input
def test_unreadable_image_later(run_sd15, tmp_path, workers):
    columns = pair_columns(12)
    bad = list(pair_stream(list(range(12)), 0, 0, 12))[-1][1]
    columns["jpg_0"][bad] = b"no image"
    with pytest.raises(ValueError, match=rf"Row {bad} \('.*'\): jpg_0 cannot be read as an image"):
        run_sd15(
            dataset_name=write_parquet(tmp_path / "data", columns),
            loss_space="latent",
            max_train_steps=8,
            checkpointing_steps=2,
            dataloader_num_workers=workers,
        )
    assert all(weight.any() for weight in run_sd15.up_weights("checkpoint-4").values())
    assert not (run_sd15.output_dir / "checkpoint-6").exists()


@pytest.mark.bad_input
def test_a_run_that_fails_leaves_no_workers_waiting(run_sd15, tmp_path):
    columns = pair_columns(12)
    bad = list(pair_stream(list(range(12)), 0, 0, 12))[-1][1]
    columns["jpg_0"][bad] = b"no image"
    options = {"dataset_name": write_parquet(tmp_path / "data", columns), "loss_space": "latent", "max_train_steps": 8}
    words = run_sd15.command([], {f"--{name}": value for name, value in options.items()})
    log = tmp_path / "log"
    process = start_script("train_ncp_dpo_sd15.py", [*words, "--dataloader_num_workers", "2"], log)
    process.join(300)
    assert process.exitcode == 2 and f"Row {bad} " in log.read_text()


@pytest.mark.bad_input
def test_a_worker_that_is_killed_ends_the_run(run_sd15, monkeypatch):
    read_images = preference_pairs.read_images

    def read(*args):
        # As by a system that is short of memory.
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_images(*args)

    monkeypatch.setattr(preference_pairs, "read_images", read)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run_sd15(loss_space="latent", dataloader_num_workers=1)


@pytest.mark.bad_input
def test_a_file_that_is_not_there_is_named_before_training(checkpoints, tmp_path, no_models):
    folder = Path(build_image_folder(tmp_path / "images", num_pairs=6))
    last = [row for _, row in pair_stream(list(range(6)), 0, 0, 6)][-1]
    (folder / f"images/{last}_jpg_1.png").unlink()
    run = Run("sd15", checkpoints["sd15"], None, tmp_path / "output")
    with pytest.raises(
        ValueError, match=f"Row {last}: jpg_1 is 'images/{last}_jpg_1.png', which is no file in .*images"
    ):
        run(train_data_dir=folder)
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(train_data_dir=folder, on_bad_sample="skip")


def test_image_folder(checkpoints, tmp_path, caplog):
    run = Run("sd15", checkpoints["sd15"], None, tmp_path / "output")
    caplog.set_level(logging.INFO)
    folder = build_image_folder(tmp_path / "images", num_pairs=4, num_ties=2)
    run(train_data_dir=folder, loss_space="latent")
    assert all(weight.any() for weight in run.up_weights().values())
    assert "4 pairs with a winner; 2 ties are left out" in caplog.text


def test_image_folder_equals_parquet(tmp_path, parquet):
    from_folder = load_pairs(train_data_dir=build_image_folder(tmp_path / "images"))
    from_parquet = load_pairs(dataset_name=parquet)
    assert from_folder.rows == from_parquet.rows == list(range(12))
    assert from_folder.columns() == from_parquet.columns()
    for row in range(12):
        a, b = from_folder[0, row], from_parquet[0, row]
        assert all(torch.equal(x, y) for x, y in zip(images(a), images(b)))


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
    bad = [row for _, row in pair_stream(list(range(4)), 0, 0, 4)][0 if position == "first" else -1]
    columns["jpg_1"][bad] = BAD_IMAGES[kind_of_image]
    with pytest.raises(ValueError, match=rf"Row {bad} \('.*'\): jpg_1 cannot be read as an image: ."):
        run_sd15(dataset_name=write_parquet(tmp_path / "data", columns), loss_space="latent", max_train_steps=4)


def test_a_substitute_has_noise_of_its_own(tmp_path):
    columns = pair_columns(3)
    columns["jpg_0"][1] = b""
    pairs = make_pairs(columns, on_bad_sample="skip")
    substitute, itself = pairs[0, 1], pairs[0, 2]
    assert substitute["rows"] == itself["rows"] == 2 and substitute["skipped"]
    assert not torch.equal(substitute["noise"], itself["noise"])


@pytest.fixture
def forkserver():
    """Starts processes as Python does from 3.14 on, and as on macOS, with nothing of this one."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("forkserver", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.bad_input
def test_bad_images_are_skipped_and_named(run_sd15, tmp_path, caplog, workers, forkserver):
    caplog.set_level(logging.INFO)
    columns = pair_columns(6)
    columns["jpg_1"][2] = BAD_IMAGES["truncated"]
    columns["jpg_0"][4] = BAD_IMAGES["text"]
    run_sd15(
        dataset_name=write_parquet(tmp_path / "data", columns),
        on_bad_sample="skip",
        loss_space="latent",
        max_train_steps=6,
        dataloader_num_workers=workers,
    )
    for row, column in [(2, "jpg_1"), (4, "jpg_0")]:
        caption = re.escape(repr(columns["caption"][row]))
        assert re.search(rf"Row {row} \({caption}\): {column} cannot be read as an image", caplog.text)
    assert re.search(r"The next pair is taken \(\d so far\)", caplog.text)
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
    run_sd15(dataset_name=write_parquet(tmp_path / "data", columns), loss_space="latent", max_train_steps=1)
    assert run_sd15.lora()


@pytest.mark.parametrize("caption", ["", "word " * 2000, "🐈‍⬛ 在 sofa"])
@pytest.mark.bad_input
def test_any_text_is_a_caption(run_sd15, tmp_path, caption):
    columns = pair_columns(2)
    columns["caption"] = [caption] * 3
    run_sd15(dataset_name=write_parquet(tmp_path / "data", columns), loss_space="latent", max_train_steps=1)
    assert run_sd15.lora()


@pytest.mark.bad_input
def test_empty_dataset(run_sd15, no_models, tmp_path):
    columns = {name: values[:0] for name, values in pair_columns(1).items()}
    with pytest.raises(ValueError, match='No pair is left|"train" corresponds to no data'):
        run_sd15(dataset_name=write_parquet(tmp_path / "data", columns))


@pytest.mark.bad_input
def test_one_pair_is_enough_for_an_error_scale(run_sd15, tmp_path):
    options = {"dataset_name": write_parquet(tmp_path / "data", pair_columns(1)), "train_batch_size": 1}
    # It comes again at other timesteps.
    run_sd15(ncp_error_scale="auto", **options)
    assert run_sd15.lora()


@pytest.mark.bad_input
def test_equal_images_have_no_error_scale(run_sd15, tmp_path):
    columns = pair_columns(2)
    columns["jpg_1"] = columns["jpg_0"]
    options = {"dataset_name": write_parquet(tmp_path / "data", columns), "train_batch_size": 2}
    with pytest.raises(RuntimeError, match="Give --ncp_error_scale, it cannot be measured: 0 pairs have margins"):
        run_sd15(ncp_error_scale="auto", **options)


def test_a_file_may_occur_in_several_pairs(checkpoints, tmp_path):
    folder = tmp_path / "images"
    build_image_folder(folder, num_pairs=3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["jpg_0_file_name"] = rows[0]["jpg_0_file_name"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = Run("sd15", checkpoints["sd15"], None, tmp_path / "output")
    run(train_data_dir=folder, loss_space="latent", max_train_steps=1)


# Held-out pairs


def images_of(pairs):
    """The bytes of all images of the pairs."""
    names = (pairs.args.image_0_column, pairs.args.image_1_column)
    return {pairs.dataset[row][name]["bytes"] for row in pairs.rows for name in names}


def repeated_columns(captions):
    """Every pair under two captions: that of `pair_columns`, and what the function `captions` makes of it."""
    columns = {name: [value for value in values for _ in range(2)] for name, values in pair_columns(12, 0).items()}
    columns["caption"] = [captions(text) if row % 2 else text for row, text in enumerate(columns["caption"])]
    return columns


@pytest.mark.parametrize(
    "captions",
    [
        str.upper,
        lambda text: f" {text.replace(' ', '  ')}\n",
        lambda text: text.replace("p", "\uff50"),
        lambda text: f"a photo of {text}",
    ],
)
def test_held_out_pairs_share_no_prompt_and_no_image(captions):
    pairs = make_pairs(repeated_columns(captions))
    trained, held_out = pairs.hold_out(7)
    assert len(held_out.rows) == 8 and sorted(trained.rows + held_out.rows) == pairs.rows
    assert not images_of(trained) & images_of(held_out)
    prompts = [set(map(preference_pairs.same_prompt_key, part.columns()[1])) for part in (trained, held_out)]
    assert prompts[0].isdisjoint(prompts[1])
    # The same for a seed, others for another.
    assert make_pairs(repeated_columns(captions)).hold_out(7)[1].rows == held_out.rows
    assert make_pairs(repeated_columns(captions), seed=1).hold_out(7)[1].rows != held_out.rows


def test_pairs_that_share_images_through_others_stay_together():
    columns = pair_columns(12, 0)
    # Rows 0 to 5 are a chain, in which an image is now on one side of a pair and now on the other.
    for row in range(5):
        columns["jpg_0"][row + 1] = columns["jpg_1"][row]
    for seed in range(20):
        trained, held_out = make_pairs(columns, seed=seed).hold_out(3)
        assert len(held_out.rows) == 3 and min(held_out.rows) > 5
    # Where so many are asked for, the chain is held out too.
    trained, held_out = make_pairs(columns).hold_out(7)
    assert set(range(6)) <= set(held_out.rows) and not set(held_out.rows) & set(trained.rows)
    with pytest.raises(ValueError, match="--num_eval_pairs 12 leaves no pair to train on: 12 pairs are 7 groups "):
        make_pairs(columns).hold_out(12)


@pytest.mark.bad_input
def test_pairs_whose_images_cannot_be_read_can_be_held_out(tmp_path):
    folder = Path(build_image_folder(tmp_path / "images", num_pairs=6))
    edit_metadata(folder, lambda rows: [json.dumps({**row, "jpg_0_file_name": None}) for row in rows])
    (folder / "images/0_jpg_1.png").unlink()
    trained, held_out = load_pairs(train_data_dir=str(folder), on_bad_sample="skip").hold_out(2)
    assert len(held_out.rows) == 2 and len(trained.rows) == 4


def test_the_same_pairs_of_a_folder_are_held_out(tmp_path, parquet):
    from_folder = load_pairs(train_data_dir=build_image_folder(tmp_path / "images"))
    assert from_folder.hold_out(5)[1].rows == load_pairs(dataset_name=parquet).hold_out(5)[1].rows


def write_stream(folder, columns):
    folder.mkdir(parents=True)
    table = pa.table(columns)
    with pa.OSFile(str(folder / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("with_digests", [True, False])
def test_the_same_pairs_of_encoded_data_are_held_out(tmp_path, with_digests, caplog):
    columns = repeated_columns(lambda text: f"a photo of {text}")
    pairs, args = make_pairs(columns), arguments(encoded_data_dir=str(tmp_path))
    settings = {name: getattr(args, name, None) for name in preference_pairs.ENCODING_ARGUMENTS}
    settings |= {name: getattr(args, name) for name in preference_pairs.ENCODING_HINTS}
    settings |= {"vae_scaling_factor": 1, "no_hflip": False, "num_pairs_shards": 1, "num_prompts_shards": 1}
    settings |= {"dataset_name": "pairs", "train_data_dir": None}
    settings |= {"models": {}} if with_digests else {}
    (tmp_path / "encoding.json").write_text(json.dumps(settings))
    write_stream(tmp_path / "prompts", {"caption": ["x"]})
    stored = {"row": pairs.rows, "label": columns["label_0"], "caption": columns["caption"]}
    digests = {
        f"digest_{side}": [hashlib.sha256(image).hexdigest() for image in columns[f"jpg_{side}"]] for side in (0, 1)
    }
    write_stream(tmp_path / "pairs", {**stored, **(digests if with_digests else {})})
    encoded_pairs = preference_pairs.EncodedPairs(args, {"scaling_factor": 1}, (4, 16, 16), torch.arange(1000), False)
    held_out = encoded_pairs.hold_out(7)[1]
    assert (held_out.rows == pairs.hold_out(7)[1].rows) == with_digests
    assert ("does not say which files" in caplog.text) == (not with_digests)
    assert held_out.columns()[1] == [columns["caption"][row] for row in held_out.rows]


def test_max_train_samples(parquet):
    assert load_pairs(dataset_name=parquet, max_train_samples=5).rows == [0, 1, 2, 3, 4]
