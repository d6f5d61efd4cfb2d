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

import argparse
import base64
import decimal
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import common
import datasets
import numpy as np
import pandas as pd
import preference_pairs
import pyarrow.parquet as pq
import pytest
from common import ParquetFiles, pair_ranks, row_groups, write_shards
from conftest import ROOT, run_tool
from datasets import Dataset, Features, Value, load_dataset
from PIL import Image
from preference_pairs import same_prompt_key
from prepare_preferences import encoded_bytes, inspect_image, main, parse_args
from tiny_checkpoints import build_tokenizer
from transformers import CLIPTextConfig


SCRIPT = ROOT / "tools" / "prepare_preferences.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def run(*arguments):
    return common.exit_code(main, parse_args([str(argument) for argument in arguments]))


def png(shade, size=(8, 8), format="PNG"):
    """An encoded picture; every shade another one."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(buffer, format)
    return buffer.getvalue()


def shade(image):
    return image.getpixel((0, 0))[0]


def write_image_folder(folder, rows):
    """A metadata.jsonl of the rows; image values that are bytes become files."""
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for index, row in enumerate(rows):
            for name, value in row.items():
                if isinstance(value, bytes):
                    row = {**row, name: f"{index}_{name}.png"}
                    (folder / row[name]).write_bytes(value)
            file.write(json.dumps(row) + "\n")
    return folder


def good_rows(count):
    return [
        {
            "jpg_0_file_name": png(2 * index),
            "jpg_1_file_name": png(2 * index + 1),
            "label_0": float(index % 2),
            "caption": f"prompt {index // 2}",
        }
        for index in range(count)
    ]


def write_parquet(folder, columns, num_files=1, features=None):
    """A folder of parquet files, as `--dataset_name` takes it."""
    folder.mkdir()
    dataset = Dataset.from_dict(columns, features=features)
    for index in range(num_files):
        shard = dataset.shard(num_files, index, contiguous=True)
        shard.to_parquet(str(folder / f"train-{index:05d}-of-{num_files:05d}.parquet"))
    return folder


def pair_columns(count, **columns):
    rows = good_rows(count)
    return {
        "jpg_0": [row["jpg_0_file_name"] for row in rows],
        "jpg_1": [row["jpg_1_file_name"] for row in rows],
        "label_0": [row["label_0"] for row in rows],
        "caption": [row["caption"] for row in rows],
        **columns,
    }


def table_row(output, name):
    """What the report's table says of `name`."""
    return re.search(rf"^{name}  +(.*)$", output, re.MULTILINE).group(1)


# check


@pytest.mark.parametrize("source", ["binary", "image", "folder"])
def test_check_of_good_pairs(tmp_path, capsys, source):
    columns = pair_columns(6)
    columns["label_0"][5] = 0.5
    columns["jpg_1"][5] = b"no picture, and not read"
    columns["jpg_0"][0] = png(0, (16, 32))
    if source == "folder":
        rows = [
            {"jpg_0_file_name": jpg_0, "jpg_1_file_name": jpg_1, "label_0": label, "caption": caption}
            for jpg_0, jpg_1, label, caption in zip(*columns.values())
        ]
        flags = ["--train_data_dir", write_image_folder(tmp_path / "data", rows)]
    else:
        features = Features({"jpg_0": datasets.Image(), "jpg_1": datasets.Image(), "label_0": Value("float32")})
        features["caption"] = Value("string")
        folder = write_parquet(tmp_path / "data", columns, 2, features if source == "image" else None)
        flags = ["--dataset_name", folder]
    assert run("check", *flags, "--resolution", 8, "--num_proc", 1) == 0
    output = capsys.readouterr().out
    assert table_row(output, "rows") == "6"
    assert table_row(output, "pairs").startswith("5 ")
    assert table_row(output, "ties").startswith("1 ")
    assert table_row(output, "prompts").startswith("3 ")
    assert table_row(output, "width").startswith("8 / 8 / 16")
    assert table_row(output, "height").startswith("8 / 8 / 32")
    # Less the tie's.
    assert table_row(output, "most common sizes") == "8x8 (9), 16x32 (1)"
    assert table_row(output, "long captions").startswith("not checked")
    for kind in ("unreadable images", "bad labels", "bad captions", "duplicate pairs", "small images"):
        assert table_row(output, kind).startswith("0 ")
    assert "Fit for training." in output


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


BAD_IMAGES = {
    "truncated": (lambda: png(0, (64, 64), "JPEG")[:-20], "image file is truncated"),
    "zero bytes": (lambda: b"", "empty, 0 bytes"),
    "text": (lambda: b"this is no picture", "is text instead of an image"),
    "base64": (lambda: base64.b64encode(png(0)), "base64"),
    "other bytes": (lambda: b"\xff\xfe\xfd", "not in an image format"),
    "bomb": (bomb, "400000000 pixels"),
    "missing": (lambda: "missing.png", "No such file"),
    "another folder": (lambda: "../outside.png", "../outside.png"),
    "absolute": (lambda: "/etc/hostname", "/etc/hostname"),
    "link": (lambda: "link.png", "link.png"),
    "null": (lambda: None, "null instead of an image"),
    "damaged": (lambda: png(3, (64, 64))[:60] + b"\0" * 40, "3_jpg_0_file_name.png: "),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
@pytest.mark.bad_input
def test_check_names_unreadable_images(tmp_path, capsys, kind):
    make, reason = BAD_IMAGES[kind]
    rows = good_rows(5)
    rows[3]["jpg_0_file_name"] = make()
    folder = write_image_folder(tmp_path / "data", rows)
    (tmp_path / "outside.png").write_bytes(png(0))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    assert run("check", "--train_data_dir", folder, "--num_proc", 1) == 1
    output = capsys.readouterr().out
    assert table_row(output, "unreadable images").startswith("1 ")
    assert re.search(rf"^  row 3, jpg_0: .*{reason}", output, re.MULTILINE)
    assert "Not fit for training: 1 unreadable images." in output


def test_check_names_small_images_and_uses_exif_orientation(tmp_path, capsys):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 20)).save(turned, "JPEG", exif=exif)
    folder = write_parquet(tmp_path / "data", pair_columns(2, jpg_1=[png(0, (1, 1)), turned.getvalue()]))
    assert run("check", "--dataset_name", folder, "--num_proc", 1, "--resolution", 8) == 0
    output = capsys.readouterr().out
    assert "row 0, jpg_1: 1x1" in output and "20x9 (1)" in output


@pytest.mark.bad_input
def test_check_finds_bad_images_first_last_and_in_order(tmp_path, capsys):
    columns = pair_columns(30)
    for row in (0, 17, 29):
        columns["jpg_1"][row] = b"bad"
    columns["jpg_0"][17] = None
    folder = write_parquet(tmp_path / "data", columns)
    assert run("check", "--dataset_name", folder, "--num_proc", 2) == 1
    found = re.findall(r"row (\d+), (jpg_\d): (.*)", capsys.readouterr().out.split("\n\n")[1])
    assert [(row, column) for row, column, _ in found] == [
        ("0", "jpg_1"),
        ("17", "jpg_0"),
        ("17", "jpg_1"),
        ("29", "jpg_1"),
    ]
    assert found[1][2] == "null instead of an image"


@pytest.mark.bad_input
def test_check_of_labels_and_captions(tmp_path, capsys):
    rows = good_rows(8)
    for row, label in zip(rows, (None, float("nan"), 2)):
        row["label_0"] = label
    for row, caption in zip(rows[4:], (None, "", "x" * 10_000, "\U0001f63a")):
        row["caption"] = caption
    folder = write_image_folder(tmp_path / "data", rows)
    assert run("check", "--train_data_dir", folder, "--num_proc", 1) == 1
    output = capsys.readouterr().out
    assert re.findall(r"row (\d+), the label is (.*), but", output) == [("0", "None"), ("1", "nan"), ("2", "2.0")]
    assert re.findall(r"row (\d+), the caption is (.*), but", output) == [("4", "null")]
    assert "empty captions:\n  row 5\n" in output
    assert "Not fit for training: 3 bad labels, 1 bad captions." in output


@pytest.mark.bad_input
@pytest.mark.parametrize("source", ["dataset_name", "train_data_dir"])
def test_check_of_probabilities(tmp_path, capsys, source):
    def check(folder, values, column="sure"):
        if source == "dataset_name":
            write_parquet(tmp_path / folder, pair_columns(len(values), sure=values))
        else:
            rows = [{**row, "sure": value} for row, value in zip(good_rows(len(values)), values)]
            write_image_folder(tmp_path / folder, rows)
        flags = ["--preference_probability_column", column, "--num_proc", 1]
        return run("check", f"--{source}", tmp_path / folder, *flags), capsys.readouterr()

    code, output = check("good", [0.0, 0.5, 1.0])
    assert code == 0 and table_row(output.out, "bad probabilities").startswith("0 ")
    code, output = check("bad", [0.5, -0.1, 1.1, None])
    assert code == 1 and "Not fit for training: 3 bad probabilities." in output.out
    assert table_row(output.out, "bad probabilities").startswith("3  not from 0 to 1; training stops at one")
    assert "row 1, the preference probability is -0.1, but must be from 0 to 1" in output.out
    assert "row 3, the preference probability is None" in output.out
    code, output = check("other", [0.5], "nothing")
    assert code == 2 and re.search("has no (column )?'nothing'", output.err)


def test_empty_and_long_captions_alone_do_not_stop_training(tmp_path, capsys):
    folder = write_parquet(tmp_path / "data", pair_columns(3, caption=["", "  ", "x" * 10_000]))
    assert run("check", "--dataset_name", folder, "--num_proc", 1) == 0
    assert table_row(capsys.readouterr().out, "empty captions").startswith("2 ")


def test_check_counts_tokens(tmp_path, capsys):
    # Without a limit of its own: the text encoder's holds.
    tokenizer = build_tokenizer(tmp_path / "model" / "tokenizer")
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    CLIPTextConfig().save_pretrained(tmp_path / "model" / "text_encoder")
    captions = ["short", "x" * 75, "x" * 76, "x" * 76, "\U0001f63a" * 30]  # a byte-level tokenizer: 4 tokens a cat
    folder = write_parquet(tmp_path / "data", pair_columns(5, caption=captions))
    flags = ["--pretrained_model_name_or_path", tmp_path / "model", "--num_proc", 1]
    assert run("check", "--dataset_name", folder, *flags) == 0
    output = capsys.readouterr().out
    assert table_row(output, "long captions").startswith("2  prompts of more than 77 tokens")
    assert "row 2: 78 tokens" in output and "row 4: 122 tokens" in output


def test_check_finds_repeated_contradicting_and_identical_pairs(tmp_path, capsys):
    a, b, c = png(1), png(2), png(3)
    pairs = [
        (a, b, 1, "x"),
        (b, a, 0, "x"),  # row 0 again
        (a, b, 0, "x"),  # the opposite
        (a, b, 0, "y"),  # another prompt
        (a, c, 1, "x"),
        (c, a, 1, "x"),  # the opposite
        (a, a, 1, "x"),
        (a, c, 0.5, "x"),  # a tie says neither
        (b, c, 0, "x"),
        (c, b, 0, " X"),  # the opposite, under the same prompt
    ]
    jpg_0, jpg_1, labels, captions = zip(*pairs)
    columns = {"jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": [float(label) for label in labels], "caption": captions}
    folder = write_parquet(tmp_path / "data", columns)
    assert run("check", "--dataset_name", folder, "--num_proc", 1) == 0
    output = capsys.readouterr().out
    assert "duplicate pairs:\n  rows 0, 1\n" in output
    assert "contradicting pairs:\n  rows 0, 1 against 2\n  rows 4 against 5\n  rows 8 against 9\n" in output
    assert "recurring pairs:\n  rows 0, 3\n\n" in output
    assert "identical images:\n  row 6\n" in output


def test_check_takes_the_same_prompts_and_uids_for_the_same(tmp_path, capsys):
    pairs = [
        ("A  photo", "u", "v", 1),
        ("a photo ", "v", "u", 0),  # row 0 again, in other files
        ("\uff21 photo", "u", "v", 0),  # the opposite
        ("another", "u", "v", 1),
        ("another", "w", "w", 1),
        ("another", None, "v", 1),  # by its content
    ]
    captions, uids_0, uids_1, labels = zip(*pairs)
    columns = pair_columns(6, caption=captions, label_0=[float(label) for label in labels])
    for folder, uids in (("uids", {"image_0_uid": uids_0, "image_1_uid": uids_1}), ("none", {})):
        flags = ["--dataset_name", write_parquet(tmp_path / folder, {**columns, **uids}), "--num_proc", 1]
        assert run("check", *flags) == 0
        output = capsys.readouterr().out
        assert table_row(output, "prompts").startswith("2 ")
        assert ("duplicate pairs:\n  rows 0, 1\n" in output) == bool(uids)
        assert ("contradicting pairs:\n  rows 0, 1 against 2\n" in output) == bool(uids)
        assert ("identical images:\n  row 4\n" in output) == bool(uids)


def test_same_prompt_key():
    assert same_prompt_key("  A\u00a0 Caf\u00e9\n") == same_prompt_key("a cafe\u0301") == "a caf\u00e9"
    assert same_prompt_key("Stra\u00dfe") == same_prompt_key("STRASSE")
    assert same_prompt_key("a cat") != same_prompt_key("acat") and same_prompt_key(" ") == ""


def test_check_lists_as_many_findings_as_asked(tmp_path, capsys):
    folder = write_parquet(tmp_path / "data", pair_columns(5, jpg_0=[b"bad"] * 5))
    assert run("check", "--dataset_name", folder, "--num_proc", 1, "--max_listed", 2) == 1
    output = capsys.readouterr().out
    assert "row 1, jpg_0" in output and "row 2, jpg_0" not in output and "and 3 more" in output


@pytest.mark.bad_input
def test_check_without_a_pair(tmp_path, capsys):
    for flags in (
        ["--train_data_dir", write_image_folder(tmp_path / "data", [])],
        ["--dataset_name", write_parquet(tmp_path / "ties", pair_columns(2, label_0=[0.5, 0.5]))],
    ):
        assert run("check", *flags, "--num_proc", 1) == 1
        assert "Not fit for training: no pair is left." in capsys.readouterr().out


def test_check_runs_in_any_folder_and_code_page(tmp_path):
    folder = write_image_folder(tmp_path / "data", good_rows(3))
    (folder / "1_jpg_0_file_name.png").write_bytes(b"")
    rows = (folder / "metadata.jsonl").read_text().replace("jpg_0_file", "\u753b\u50cf_file")
    (folder / "metadata.jsonl").write_text(rows.replace("1_\u753b\u50cf", "1_jpg_0"), encoding="utf-8-sig")
    command = [
        sys.executable,
        str(SCRIPT),
        "check",
        "--train_data_dir",
        str(folder),
        "--image_0_column",
        "\u753b\u50cf",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(PYTHONUTF8="0", PYTHONIOENCODING="cp1252", HF_HOME=str(tmp_path / "hf"))
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 1, result.stderr
    assert r"row 1, \u753b\u50cf: 1_jpg_0_file_name.png: empty, 0 bytes" in result.stdout


GREYS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (GREYS, None),
        (GREYS.astype(np.float32) / 255, None),
        (GREYS.astype(np.int32), None),
        (GREYS.astype(np.uint16) * 16, None),
        (GREYS.astype(np.int32) * 1000, "0 to 252000, but must be"),
        (GREYS.astype(np.float32), "0 to 252, but must be"),
    ],
)
@pytest.mark.bad_input
def test_inspect_image_says_what_training_says(tmp_path, pixels, problem):
    Image.fromarray(pixels).save(tmp_path / "grey.tiff")
    for value in (tmp_path / "grey.tiff", str(tmp_path / "grey.tiff"), {"bytes": None, "path": "grey.tiff"}):
        if isinstance(value, dict):
            value["path"] = str(tmp_path / "grey.tiff")
        size, digest, found = inspect_image(value)
        if problem is None:
            assert (size, found) == ((8, 8), None)
            assert digest == inspect_image((tmp_path / "grey.tiff").read_bytes())[1]
            preference_pairs.read_image((tmp_path / "grey.tiff").read_bytes())
        else:
            assert size is digest is None and problem in found
            with pytest.raises(ValueError, match=problem):
                preference_pairs.read_image((tmp_path / "grey.tiff").read_bytes())


# What check and training say of the same data


def change_metadata(**changes):
    """An image folder of six pairs whose lines are changed; line 4 (row 3) by `line`, a text or a dict."""

    def build(folder):
        rows = good_rows(6)
        for row, caption in zip(rows, changes.get("captions", ())):
            row["caption"] = caption
        write_image_folder(folder, rows)
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        line = changes.get("line", {})
        lines[3] = line if isinstance(line, str) else json.dumps({**json.loads(lines[3]), **line})
        text = changes.get("start", "") + "\n".join(lines * changes.get("times", 1) + changes.get("more", []))
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
        return ["--train_data_dir", folder]

    return build


def late_tie(folder):
    """The first label that is no integer comes after 12 MB."""
    flags = change_metadata(captions=["x" * 40_000] * 6, times=50)(folder)
    lines = (folder / "metadata.jsonl").read_text().replace(".0,", ",").splitlines()
    lines[-1] = lines[-1].replace('"label_0": 1,', '"label_0": 0.5,')
    assert "0.5" in lines[-1]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return flags


def shards(*changes):
    """A folder with a parquet file of four pairs for each of these changes to the columns; `None` takes one away."""

    def build(folder):
        folder.mkdir()
        for index, change in enumerate(changes):
            columns = {name: values for name, values in pair_columns(4, **change).items() if values is not None}
            Dataset.from_dict(columns).to_parquet(str(folder / f"train-{index}.parquet"))
        return ["--dataset_name", folder]

    return build


def broken_mask(folder):
    features = Features({"jpg_0": Value("binary"), "jpg_1": Value("binary"), "label_0": Value("float64")})
    features.update(caption=Value("string"), mask=datasets.Image())
    mask = [{"bytes": b"broken", "path": None}] * 4
    return ["--dataset_name", write_parquet(folder, pair_columns(4, mask=mask), 1, features)]


def parquet_file(folder):
    return ["--dataset_name", next(write_parquet(folder, pair_columns(4)).iterdir())]


def missing_split(folder):
    file = next(write_parquet(folder, pair_columns(4)).iterdir())
    shutil.move(file, folder / "validation.parquet")
    return ["--dataset_name", folder]


def saved_to_disk(folder):
    Dataset.from_dict(pair_columns(4)).save_to_disk(str(folder))
    return ["--dataset_name", folder]


def damaged_shard(folder):
    flags = shards({})(folder)
    (folder / "train-1.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    return flags


# What is built, and what is said of it: `None` if it is fit for training.
DATASETS = {
    "late tie": (late_tie, None),
    "captions like dates": (change_metadata(captions=[f"2024-01-0{day}" for day in range(1, 7)]), None),
    "byte-order mark": (change_metadata(start="\ufeff"), None),
    "whole numbers": (change_metadata(line={"label_0": 1}), None),
    "lone surrogate": (change_metadata(line={"caption": "bad \ud83d emoji"}), "metadata.jsonl, line 4: "),
    "broken line": (change_metadata(line="{'caption': 1}"), "metadata.jsonl, line 4: "),
    "list": (change_metadata(line='["no object"]'), "metadata.jsonl, line 4: "),
    "label in text": (change_metadata(line={"label_0": "1"}), "metadata.jsonl, line 4: "),
    "caption in a list": (change_metadata(line={"caption": ["a"]}), "metadata.jsonl, line 4: "),
    "number for a file": (change_metadata(line={"jpg_0_file_name": 7}), "metadata.jsonl, line 4: "),
    "line without a label": (change_metadata(more=['{"caption": "x"}']), "metadata.jsonl, line 7: "),
    "label 2": (change_metadata(line={"label_0": 2}), "Row 3: the label is 2.0"),
    "null label": (change_metadata(line={"label_0": None}), "Row 3: the label is None"),
    "null caption": (change_metadata(line={"caption": None}), "Row 3: the caption is null"),
    "int, then float shards": (shards({"label_0": [0, 1, 1, 0]}, {"label_0": [0.5, 1.0, 0.0, 0.5]}), None),
    "float, then int shards": (shards({}, {"label_0": [0, 1, 1, 0]}), None),
    "decimals": (shards({"label_0": [decimal.Decimal(text) for text in ("0.5", "1.0", "0.0", "1.0")]}), None),
    "another column in a shard": (shards({}, {"extra": [1, 2, 3, 4]}), None),
    "broken column that is not used": (broken_mask, None),
    "no label in a shard": (shards({}, {"label_0": None}), "train-1.parquet has no column 'label_0' (--label_column)"),
    "text for labels": (shards({"label_0": ["1"] * 4}), "column label_0 (--label_column) is of type string"),
    "lists for captions": (shards({"caption": [["a"]] * 4}), "column caption (--caption_column) is of type list"),
    "damaged shard": (damaged_shard, "train-1.parquet "),
    "only ties": (shards({"label_0": [0.5] * 4}), "all 4 rows are ties"),
    "no rows": (shards({name: [] for name in ("jpg_0", "jpg_1", "label_0", "caption")}), "cannot be read: "),
    "parquet file": (parquet_file, "it is a file"),
    "missing split": (missing_split, "its splits (--dataset_split_name) are validation, not train"),
    "save_to_disk": (saved_to_disk, "it was written by save_to_disk"),
    "nothing": (lambda folder: ["--dataset_name", folder], "cannot be read: "),
    "no metadata.jsonl": (lambda folder: ["--train_data_dir", folder], "there is no file"),
}


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.bad_input
def test_check_and_training_say_the_same(tmp_path, capsys, kind):
    build, message = DATASETS[kind]
    flags = [str(word) for word in build(tmp_path / "data")]
    code = run("check", *flags, "--num_proc", 1)
    output, errors = capsys.readouterr()

    parser = argparse.ArgumentParser()
    preference_pairs.add_arguments(parser)
    args = parser.parse_args(["--pretrained_model_name_or_path", "none", *flags])
    try:
        dataset = preference_pairs.load_dataset(args)
    except ValueError as error:
        assert code == 2 and errors.splitlines()[-1].endswith(f": error: {' '.join(str(error).split())}")
        assert message in str(error)
        return
    try:
        rows = preference_pairs.find_rows(args, dataset)
    except ValueError as error:
        assert code == 1 and message in str(error)
        finding = str(error).removesuffix(".").replace(": ", ", ", 1)
        assert finding in output.replace("  row ", "Row ") or "Not fit for training: no pair is left." in output
    else:
        assert (code, message) == (0, None) and output.endswith("Fit for training.\n"), errors
        assert table_row(output, "pairs").startswith(f"{len(rows)} ")


# Errors of the input as a whole


@pytest.mark.bad_input
def test_errors_name_the_flag_column_file_or_row(tmp_path, capsys):
    folder = write_parquet(tmp_path / "data", pair_columns(4))
    images = write_image_folder(tmp_path / "images", good_rows(2))
    broken = write_image_folder(tmp_path / "broken", good_rows(1))
    with open(broken / "metadata.jsonl", "a") as file:
        file.write('\n["no object"]\n')
    damaged = write_parquet(tmp_path / "damaged", {"prompt": ["x"], "chosen": [png(1)], "rejected": [png(2)]})
    (damaged / "train-1.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    narrower = write_parquet(tmp_path / "narrower", {"prompt": ["x"], "chosen": [png(1)], "rejected": [png(2)]})
    Dataset.from_dict({"prompt": ["x"], "chosen": [png(1)]}).to_parquet(str(narrower / "train-1.parquet"))
    numbers = write_parquet(tmp_path / "numbers", {"prompt": [1], "chosen": [png(1)], "rejected": [png(2)]})
    a_file = folder / "train-00000-of-00001.parquet"
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    new = ["--output_dir", tmp_path / "new"]
    cases = [
        (["check"], "--dataset_name or --train_data_dir"),
        (["check", "--dataset_name", folder, "--train_data_dir", images], "--dataset_name or --train_data_dir"),
        (["check", "--dataset_name", folder, "--pretrained_model_name_or_path", "./none"], "none"),
        (["check", "--dataset_name", folder, "--pretrained_model_name_or_path", images], "tokenizer_config.json"),
        (["check", "--dataset_name", folder, "--image_1_column", "b"], "'b' (--image_1_column)"),
        (["check", "--train_data_dir", images, "--image_0_column", "a"], "'a_file_name'"),
        (["check", "--train_data_dir", images, "--label_column", "win"], "'win'"),
        (["convert", "pairs", "--dataset_name", folder, "--output_dir", full], f"--output_dir {full}"),
        (["convert", "pairs", "--dataset_name", damaged, *new], "damaged/train-1.parquet: "),
        (["convert", "pairs", "--dataset_name", narrower, *new], "narrower/train-1.parquet: it has no rejected"),
        (["convert", "pairs", "--dataset_name", numbers, *new], "prompt (--caption_column) is of type int64"),
        (["convert", "pairs", "--dataset_name", folder, *new], "'prompt' (--caption_column)"),
        (["convert", "folders", "--winners", full, "--losers", "none", *new], "none"),
    ]
    filter_cases = [
        (["--train_data_dir", broken], "metadata.jsonl, line 3"),
        (["--dataset_name", tmp_path / "nothing"], "nothing"),
        (["--dataset_name", folder, "--dataset_split_name", "dev"], "--dataset_split_name"),
        (["--dataset_name", folder, "--image_0_uid_column", "a", "--image_1_uid_column", "b"], "'a' (--image_0_uid"),
        (["--dataset_name", folder, "--image_0_uid_column", "caption"], "--image_1_uid_column"),
        (["--dataset_name", folder, "--image_1_column", "c"], "'c' (--image_1_column)"),
    ]
    cases += [(["filter", *flags, "--output_file", full / "x"], message) for flags, message in filter_cases]
    cases.append((["filter", "--dataset_name", folder, "--output_file", a_file], f"--output_file {a_file}"))
    for file in (tmp_path / "nowhere", damaged / "train-1.parquet"):
        cases.append(
            (["convert", "rows", "--dataset_name", folder, "--rows_file", file, *new], f"--rows_file {file} ")
        )
    mixed = write_parquet(tmp_path / "mixed", pair_columns(4))
    Dataset.from_dict(pair_columns(4, label_0=["1"] * 4)).to_parquet(str(mixed / "train-1.parquet"))
    cases.append(
        (["filter", "--dataset_name", mixed, "--output_file", full / "x"], "mixed: columns of its files differ in")
    )
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert ": error: " in error and message in error, (arguments, error)


# filter


def random_metadata(num_rows, seed):
    """Comparisons of a few images under a few prompts; some images occur under two prompts."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        prompt = rng.randrange(num_rows // 8)
        first, second = rng.sample(range(6), 2)
        rows.append(
            {
                "caption": f"prompt {prompt}",
                "image_0_uid": f"{prompt // 2}-{first}",
                "image_1_uid": f"{prompt // 2}-{second}",
                # Mostly transitive, so that absolute winners exist.
                "label_0": rng.choices([float(first < second), float(first > second), 0.5], [85, 10, 5])[0],
                "ranking_id": rng.randrange(10_000),
            }
        )
    return rows


def filter_slowly(rows, min_wins, losers, max_pairs, order):
    """The definition, image by image."""
    kept = []
    for caption in {row["caption"] for row in rows}:
        results = {}  # image -> its results under this prompt, in row order
        for index, row in enumerate(rows):
            if row["caption"] == caption:
                images = [row["image_0_uid"], row["image_1_uid"]]
                for side, score in enumerate((row["label_0"], 1 - row["label_0"])):
                    results.setdefault(images[side], []).append((score, index, images[1 - side]))
        of_prompt = []
        for wins in results.values():
            num_wins = len({loser for _, _, loser in wins})
            if all(score == 1 for score, _, _ in wins) and num_wins >= min_wins:
                indices = {}
                for _, index, loser in wins:
                    indices.setdefault(loser, index)
                if losers == "latest":
                    latest = max(wins, key=lambda win: (rows[win[1]][order] if order else 0, win[1]))
                    indices = {latest[2]: latest[1]}
                of_prompt += [(-num_wins, index) for index in indices.values()]
        kept += [index for _, index in sorted(of_prompt)[:max_pairs]]
    return sorted(kept)


@pytest.mark.parametrize("losers", ["all", "latest"])
@pytest.mark.parametrize("min_wins", [1, 2])
@pytest.mark.parametrize("max_pairs", [None, 2])
@pytest.mark.parametrize("order", [None, "ranking_id"])
def test_filter_equals_the_definition(tmp_path, capsys, losers, min_wins, max_pairs, order):
    rows = random_metadata(600, seed=min_wins)
    folder = write_parquet(tmp_path / "data", pd.DataFrame(rows).to_dict("list"), num_files=3)
    flags = ["--min_wins", min_wins, "--losers", losers]
    flags += [] if max_pairs is None else ["--max_pairs_per_prompt", max_pairs]
    flags += [] if order is None else ["--order_column", order]
    kept_file = tmp_path / "new" / "kept.parquet"
    assert run("filter", "--dataset_name", folder, "--output_file", kept_file, *flags) == 0

    kept = pd.read_parquet(kept_file)
    expected = filter_slowly(rows, min_wins, losers, max_pairs, order)
    assert len(expected) > 10 and kept["row"].tolist() == expected
    pd.testing.assert_frame_equal(kept.drop(columns="row"), pd.DataFrame(rows).loc[expected].reset_index(drop=True))

    decided = [row["caption"] for row in rows if row["label_0"] != 0.5]
    prompts = {rows[index]["caption"] for index in expected}
    output = capsys.readouterr().out
    assert f"600 rows, {600 - len(decided)} of them ties" in output
    assert f"{len(decided)} pairs / {len(set(decided))} prompts -> {len(expected)} / {len(prompts)}\n" in output
    # What every rule would keep.
    for rule in itertools.product((1, 2), ("all", "latest")):
        count = len(filter_slowly(rows, *rule, max_pairs, order))
        assert re.search(rf"^ +{count} +\d+  --min_wins {rule[0]} --losers {rule[1]}$", output, re.MULTILINE)
    assert "cannot help" not in output


def test_filter_reads_no_image(tmp_path):
    """Images may be garbage even to the parquet reader: their bytes in the file are overwritten."""
    rows = random_metadata(64, seed=1)
    columns = pair_columns(64, **pd.DataFrame(rows).to_dict("list"))
    folder = write_parquet(tmp_path / "data", columns)
    path = next(folder.iterdir())
    metadata = pq.read_metadata(path)
    content = bytearray(path.read_bytes())
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if chunk.path_in_schema.startswith("jpg_"):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    with pytest.raises(OSError):
        pq.read_table(path)

    assert run("filter", "--dataset_name", folder, "--output_file", tmp_path / "kept.parquet") == 0
    kept = pd.read_parquet(tmp_path / "kept.parquet")
    assert kept["row"].tolist() == filter_slowly(rows, 1, "all", None, None)
    assert not {"jpg_0", "jpg_1"} & set(kept.columns)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_filter_reads_other_files_than_parquet(tmp_path, suffix):
    (tmp_path / "data").mkdir()
    file, rows = tmp_path / f"data/train.{suffix}", random_metadata(80, seed=2)

    def check_filter(name):
        frame = pd.DataFrame(rows)
        if suffix == "csv":
            frame.to_csv(file, index=False)
        else:
            frame.to_json(file, orient="records", lines=True)
        # A replaced file may have the same time.
        os.utime(file, (1e9, 1e9))
        assert run("filter", "--dataset_name", tmp_path / "data", "--output_file", tmp_path / name) == 0
        assert pd.read_parquet(tmp_path / name)["row"].tolist() == filter_slowly(rows, 1, "all", None, None)

    check_filter("kept.parquet")
    rows = [{**row, "label_0": 1 - row["label_0"]} for row in rows]
    check_filter("kept_of_others.parquet")


def test_filter_by_file_names(tmp_path):
    rows = good_rows(4)
    shared = {"jpg_0_file_name": "a.png", "caption": "same", "label_0": 1}
    rows = [{**row, **shared, "jpg_1_file_name": f"{index}.png"} for index, row in enumerate(rows)]
    rows[3].update(jpg_0_file_name="0.png", jpg_1_file_name="1.png")  # 0.png wins here, and lost to a.png
    folder = write_image_folder(tmp_path / "data", rows)
    flags = ["--image_0_uid_column", "jpg_0_file_name", "--image_1_uid_column", "jpg_1_file_name"]
    kept = tmp_path / "kept.parquet"
    assert run("filter", "--train_data_dir", folder, "--output_file", kept, *flags) == 0
    assert pd.read_parquet(kept)["row"].tolist() == [0, 1, 2]


# `(caption, image 0, image 1, label)` of each row, further flags and the rows kept, or `None` for exit code 2.
COMPARISONS = {
    "a repeated row is one win": ([("p", "A", "B", 1), ("p", "A", "B", 1)], ["--min_wins", 2], None),
    "with sides turned round too": ([("p", "A", "B", 1), ("p", "B", "A", 0)], ["--min_wins", 2], None),
    "a repeated row is one pair": ([("p", "A", "B", 1), ("p", "B", "A", 0), ("p", "A", "C", 1)], [], [0, 2]),
    "two pairs are two wins": ([("p", "A", "B", 1), ("p", "A", "C", 1)], ["--min_wins", 2], [0, 1]),
    "a space is no other prompt": ([("p", "A", "B", 1), ("p ", "C", "A", 1)], [], [1]),
    "case is no other prompt": ([("A  cat", "A", "B", 1), (" a cAT", "C", "A", 1)], [], [1]),
    "wide letters are no other prompt": ([("cat", "A", "B", 1), ("\uff43\uff41\uff54", "C", "A", 1)], [], [1]),
    "another prompt": ([("p", "A", "B", 1), ("q", "C", "A", 1)], [], [0, 1]),
    "an image against itself": ([("p", "A", "A", 1), ("p", "A", "B", 1)], [], [1]),
    "a tie with itself": ([("p", "A", "A", 0.5), ("p", "A", "B", 1)], [], [1]),
    "nothing but itself": ([("p", "A", "A", 1)], [], None),
    "the latest, repeated": (
        [("p", "A", "B", 1), ("p", "A", "C", 1), ("p", "A", "B", 1)],
        ["--losers", "latest"],
        [2],
    ),
}


@pytest.mark.parametrize("shape", ["uids", "bytes", "files"])
@pytest.mark.parametrize("case", COMPARISONS)
def test_what_filter_takes_for_the_same(tmp_path, case, shape):
    rows, flags, kept = COMPARISONS[case]
    captions, *images, labels = zip(*rows)
    columns = {"caption": captions, "label_0": [float(label) for label in labels]}
    if shape == "uids":
        columns |= {"image_0_uid": images[0], "image_1_uid": images[1]}
    else:
        columns |= {f"jpg_{side}": [png(ord(name)) for name in images[side]] for side in (0, 1)}
    if shape == "files":
        # The same picture under several names, as in the folders of most tools.
        names = {"jpg_0": "jpg_0_file_name", "jpg_1": "jpg_1_file_name"}
        columns = {names.get(name, name): values for name, values in columns.items()}
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        flags = [*flags, "--train_data_dir", write_image_folder(tmp_path / "data", rows)]
    else:
        flags = [*flags, "--dataset_name", write_parquet(tmp_path / "data", columns)]
    file = tmp_path / "kept.parquet"
    assert run("filter", *flags, "--output_file", file) == (2 if kept is None else 0)
    assert (pd.read_parquet(file)["row"].tolist() if file.exists() else None) == kept
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("kept")] == ["kept.parquet"] * (
        kept is not None
    )


def test_filter_then_convert_of_pairs_without_ids(tmp_path, capsys):
    """As `collect_preferences.py` writes them: file names say nothing of the pictures, and some columns are empty."""
    pairs = list(itertools.combinations(range(4), 2))
    columns = {
        "jpg_0": [png(10 * prompt + first) for prompt in range(5) for first, _ in pairs],
        "jpg_1": [png(10 * prompt + second) for prompt in range(5) for _, second in pairs],
        "label_0": [1.0] * 30,
        "caption": [f"prompt {prompt}" for prompt in range(5) for _ in pairs],
        "probability_0": [0.9] * 30,
        "file_name_0": [f"{first}.png" for _ in range(5) for first, _ in pairs],
        "lora_weights_0": [None] * 30,
    }
    features = Features({"jpg_0": datasets.Image(), "jpg_1": datasets.Image(), "label_0": Value("float64")})
    features |= {name: Value("string") for name in ("caption", "file_name_0", "lora_weights_0")}
    features["probability_0"] = Value("float64")
    folder = write_parquet(tmp_path / "data", columns, 2, Features({name: features[name] for name in columns}))
    kept = tmp_path / "kept.parquet"
    flags = ["--dataset_name", folder]
    assert run("filter", *flags, "--output_file", kept) == 0
    output = capsys.readouterr()
    assert "30 pairs / 5 prompts -> 15 / 5" in output.out and "30/30" in output.err
    assert run("convert", "rows", "--rows_file", kept, *flags, "--output_dir", tmp_path / "out") == 0
    dataset = load(tmp_path / "out")
    assert [shade(row["jpg_0"]) % 10 for row in dataset] == [0] * 15
    assert dataset["probability_0"][:] == [0.9] * 15


@pytest.mark.parametrize("repeated", [False, True])
def test_filter_says_when_it_cannot_help(tmp_path, capsys, repeated):
    columns = {name: values * (2 if repeated else 1) for name, values in pair_columns(4).items()}
    columns["caption"] = [str(row % 4) for row in range(len(columns["caption"]))]
    folder = write_parquet(tmp_path / "data", columns)
    assert run("filter", "--dataset_name", folder, "--output_file", tmp_path / "kept.parquet") == 0
    assert pd.read_parquet(tmp_path / "kept.parquet")["row"].tolist() == [0, 1, 2, 3]
    output = capsys.readouterr().out
    assert "cannot help" in output and re.search("^ +4 +4  --min_wins 1 --losers all\n", output, re.MULTILINE)
    assert re.search("^ +0 +0  --min_wins 2 --losers all\n", output, re.MULTILINE)


@pytest.mark.parametrize("source", ["dataset_name", "train_data_dir"])
@pytest.mark.bad_input
def test_filter_names_images_that_it_cannot_read(tmp_path, capsys, source):
    (tmp_path / "outside.png").write_bytes(png(9))
    if source == "dataset_name":
        folder = write_parquet(tmp_path / "data", pair_columns(3, jpg_1=[png(1), png(2), None]))
    else:
        rows = good_rows(3)
        rows[2]["jpg_1_file_name"] = "../outside.png"
        folder = write_image_folder(tmp_path / "data", rows)
    assert run("filter", f"--{source}", folder, "--output_file", tmp_path / "kept.parquet") == 2
    assert "row 2: jpg_1 " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label_0", 2.0, "row 5: label_0 (--label_column) is not 1, 0 or 0.5: 2.0"),
        ("label_0", None, "row 5: label_0 (--label_column) is null"),
        ("caption", None, "row 5: caption (--caption_column) is null"),
        ("image_1_uid", None, "row 5: image_1_uid (--image_1_uid_column) is null"),
        ("order", math.nan, "row 5: order (--order_column) is null or NaN"),
    ],
)
@pytest.mark.bad_input
def test_filter_names_rows_that_it_cannot_judge(tmp_path, capsys, column, value, message):
    rows = [{**row, "order": float(number)} for number, row in enumerate(random_metadata(16, seed=3))]
    rows[5][column] = value
    folder = write_parquet(tmp_path / "data", {name: [row[name] for row in rows] for name in rows[0]})
    flags = ["--output_file", tmp_path / "kept.parquet", "--order_column", "order"]
    assert run("filter", "--dataset_name", folder, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.bad_input
def test_filter_names_columns_that_it_cannot_compare(tmp_path, capsys):
    rows = random_metadata(16, seed=3)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    folder = write_parquet(tmp_path / "data", {**columns, "caption": [[caption] for caption in columns["caption"]]})
    kept = tmp_path / "kept.parquet"
    assert run("filter", "--dataset_name", folder, "--output_file", kept) == 2
    assert "column caption (--caption_column) is of type list" in capsys.readouterr().err
    rows[3]["image_0_uid"] = 3
    folder = write_image_folder(tmp_path / "folder", rows)
    assert run("filter", "--train_data_dir", folder, "--output_file", kept) == 2
    assert "metadata.jsonl mixes types in column image_0_uid" in capsys.readouterr().err
    folder = write_image_folder(tmp_path / "empty", [])
    assert run("filter", "--train_data_dir", folder, "--output_file", kept) == 2
    assert "metadata.jsonl has no rows" in capsys.readouterr().err


@pytest.mark.bad_input
def test_filter_that_keeps_nothing_writes_nothing(tmp_path, capsys):
    rows = random_metadata(16, seed=3)
    folder = write_parquet(tmp_path / "data", pd.DataFrame(rows).to_dict("list"))
    kept = tmp_path / "kept.parquet"
    assert run("filter", "--dataset_name", folder, "--output_file", kept, "--min_wins", 99) == 2
    assert "no pair is left" in capsys.readouterr().err and not kept.exists()


# convert


def load(folder):
    """A converted dataset, read back as the trainers read it."""
    dataset = load_dataset(str(folder), split="train")
    assert dataset.features["jpg_0"] == datasets.Image() and dataset.features["label_0"] == Value("float64")
    return dataset


def shades(dataset):
    """(shade of the winner, of the loser, caption) of every row."""
    return [
        (shade(row["jpg_0"]), shade(row["jpg_1"]), row["caption"])
        if row["label_0"] == 1
        else (shade(row["jpg_1"]), shade(row["jpg_0"]), row["caption"])
        for row in dataset
    ]


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_convert_pairs(tmp_path, capsys, caplog, source):
    chosen = [png(10), png(20), None, b"", png(50)]
    rejected = [png(11), png(21), png(31), png(41), png(51)]
    prompts = ["a", None, "c", "d", "e"]
    if source == "parquet":
        columns = {"prompt": prompts, "chosen": chosen, "rejected": rejected, "score": [1.0] * 5}
        flags = ["--dataset_name", write_parquet(tmp_path / "data", columns)]
    else:
        rows = [
            {"prompt": prompt, "chosen_file_name": winner, "rejected_file_name": loser}
            for prompt, winner, loser in zip(prompts, chosen, rejected)
        ]
        flags = ["--train_data_dir", write_image_folder(tmp_path / "data", rows)]
    assert run("convert", "pairs", *flags, "--output_dir", tmp_path / "out") == 0
    dataset = load(tmp_path / "out")
    assert shades(dataset) == [(10, 11, "a"), (50, 51, "e")]
    assert dataset.cast_column("jpg_1", datasets.Image(decode=False))[0]["jpg_1"]["bytes"] == png(11)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-00000-of-00001.parquet"]

    output = capsys.readouterr().out
    assert "2 pairs in 1 files" in output
    assert "skipped 2: an image cannot be read" in output and "skipped 1: no caption" in output
    skipped = [record.getMessage() for record in caplog.records]
    assert len(skipped) == 3 and skipped[0] == "skipped row 1: the caption is null, but must be a text"
    assert skipped[1].startswith("skipped row 2: ") and skipped[2] == "skipped row 3: empty, 0 bytes"

    assert run("check", "--dataset_name", tmp_path / "out", "--num_proc", 1) == 0


def test_convert_writes_shards_and_row_groups_of_bounded_size(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")  # about 1 MB
    columns = {"prompt": [str(row) for row in range(5)], "chosen": [buffer.getvalue()] * 5, "rejected": [png(1)] * 5}
    folder = write_parquet(tmp_path / "data", columns)
    pairs = [{"jpg_0": {"bytes": b"x"}, "jpg_1": {"bytes": b"y"}}] * 250
    assert [len(group) for group in row_groups(pairs)] == [100, 100, 50]
    pairs = [{"jpg_0": {"bytes": bytes(20 << 20)}, "jpg_1": {"bytes": bytes(20 << 20)}}] * 3
    assert [len(group) for group in row_groups(pairs)] == [2, 1]

    monkeypatch.setattr(common, "ROW_GROUP_SIZE", 1)
    flags = ["--output_dir", tmp_path / "out", "--max_shard_size_mb", 2]
    assert run("convert", "pairs", "--dataset_name", folder, *flags) == 0
    names = [f"train-{index:05d}-of-00003.parquet" for index in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert load(tmp_path / "out")["caption"][:] == ["0", "1", "2", "3", "4"]
    # All of them or none: the second file is damaged, the first fills shards.
    (folder / "train-1.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    flags[1] = tmp_path / "none"
    assert run("convert", "pairs", "--dataset_name", folder, *flags) == 2
    assert list((tmp_path / "none").iterdir()) == []


@pytest.mark.bad_input
def test_a_conversion_without_a_pair_or_with_an_error_leaves_nothing(tmp_path, capsys):
    columns = {"prompt": ["a", "b"], "chosen": [b"", b""], "rejected": [png(1), png(2)]}
    folder = write_parquet(tmp_path / "data", columns)
    assert run("convert", "pairs", "--dataset_name", folder, "--output_dir", tmp_path / "out") == 2
    assert "no pair is left" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def ranked_columns():
    """Two prompts in mixed order; the shade of an image is ten times its rank, plus 100 for the second prompt."""
    return {
        "prompt": ["p", "q", "p", "q", "p", "p", "r"],
        "image": [png(value) for value in (30, 110, 10, 111, 31, 20, 200)],
        "rank": [3, 1, 1, 1, 3, 2, 1],
    }


RANKING_PAIRS = {
    "all": {(10, 20, "p"), (10, 30, "p"), (10, 31, "p"), (20, 30, "p"), (20, 31, "p")},
    "best_worst": {(10, 30, "p"), (10, 31, "p")},
    "adjacent": {(10, 20, "p"), (20, 30, "p"), (20, 31, "p")},
}


@pytest.mark.parametrize("shape", ["row per image", "row per prompt", "folder", "folder of lists"])
@pytest.mark.parametrize("pairs", RANKING_PAIRS)
def test_convert_rankings(tmp_path, caplog, shape, pairs):
    columns = ranked_columns()
    if shape in ("row per prompt", "folder of lists"):
        of_prompt = {prompt: np.flatnonzero(np.array(columns["prompt"]) == prompt) for prompt in "pqr"}
        columns = {
            "prompt": list(of_prompt),
            "image": [[columns["image"][row] for row in rows] for rows in of_prompt.values()],
            "rank": [[columns["rank"][row] for row in rows] for rows in of_prompt.values()],
        }
    if shape == "row per prompt":
        features = Features({"prompt": Value("string"), "image": datasets.List(datasets.Image())})
        features["rank"] = datasets.List(Value("int64"))
        flags = ["--dataset_name", write_parquet(tmp_path / "data", columns, 1, features)]
    elif shape == "row per image":
        flags = ["--dataset_name", write_parquet(tmp_path / "data", columns, 2)]
    else:
        folder = write_image_folder(tmp_path / "data", [])
        with open(folder / "metadata.jsonl", "w") as file:
            for index, (prompt, images, rank) in enumerate(zip(*columns.values())):
                names = []
                for position, image in enumerate(images if isinstance(images, list) else [images]):
                    names.append(f"{index}_{position}.png")
                    (folder / names[-1]).write_bytes(image)
                row = {"prompt": prompt, "rank": rank, "image_file_name": names if len(names) > 1 else names[0]}
                if shape == "folder of lists":
                    row["image_file_name"] = names
                file.write(json.dumps(row) + "\n")
        flags = ["--train_data_dir", folder]
    assert run("convert", "rankings", *flags, "--pairs", pairs, "--output_dir", tmp_path / "out") == 0
    found = shades(load(tmp_path / "out"))
    assert len(found) == len(RANKING_PAIRS[pairs]) and set(found) == RANKING_PAIRS[pairs]
    assert len([record for record in caplog.records if "no two images of different ranks" in record.getMessage()]) == 2


def test_convert_rankings_of_scores_in_groups(tmp_path, caplog):
    columns = {
        "text": ["p", "p", "p", "p", "q", None, "p"],
        "group": [1, 1, 2, 2, 1, 1, None],
        "image": [png(value) for value in (10, 20, 30, 40, 50, 60, 70)],
        "score": [0.1, 0.9, 0.8, None, 0.3, 0.4, 0.5],
    }
    folder = write_parquet(tmp_path / "data", columns)
    flags = ["--caption_column", "text", "--group_column", "group", "--rank_column", "score", "--higher_is_better"]
    assert run("convert", "rankings", "--dataset_name", folder, *flags, "--output_dir", tmp_path / "out") == 0
    assert shades(load(tmp_path / "out")) == [(20, 10, "p")]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped row 4: its caption is not that of its group's first row",
        "skipped row 5: text is null",
        "skipped row 6: group is null",
        "skipped row 3: the rank is None; it must be a number",
        "skipped the ranking of 2: no two images of different ranks",
    ]


@pytest.mark.bad_input
def test_convert_rankings_skips_rows_without_a_ranking(tmp_path, caplog):
    columns = {
        "prompt": ["a", "b", None],
        "image": [[png(1), png(2)], [png(3), png(4)], [png(5), png(6)]],
        "rank": [[2, 1], [1], [1, 2]],
    }
    folder = write_parquet(tmp_path / "data", columns)
    assert run("convert", "rankings", "--dataset_name", folder, "--output_dir", tmp_path / "out") == 0
    assert shades(load(tmp_path / "out")) == [(2, 1, "a")]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["skipped row 1", "skipped row 2"]


def test_pair_ranks():
    assert pair_ranks([], "best_worst", False) == pair_ranks([1, 1], "all", False) == []
    assert pair_ranks([5, 7], "adjacent", False) == [(0, 1)]
    assert pair_ranks([5, 7, 6], "adjacent", True) == [(1, 2), (2, 0)]


def test_convert_folders(tmp_path, caplog, capsys):
    winners, losers = tmp_path / "winners", tmp_path / "losers"
    for folder, shade in ((winners, 10), (losers, 20)):
        folder.mkdir()
        (folder / "sub").mkdir()
        (folder / "a.png").write_bytes(png(shade))
        (folder / "sub" / "a.jpg").write_bytes(png(shade + 1))
    (winners / "a.txt").write_text("\ufeffa cat,\n  asleep\n", encoding="utf-8")
    (winners / "sub" / "a.txt").write_text("\U0001f63a", encoding="utf-8")
    (winners / "alone.png").write_bytes(png(1))
    (losers / "left.png").write_bytes(png(1))
    for folder in (winners, losers):
        (folder / "silent.webp").write_bytes(png(1))
        (folder / "latin.png").write_bytes(png(1))
    (winners / "latin.txt").write_bytes(b"caf\xe9")
    (winners / "notes.doc").touch()
    flags = ["--winners", winners, "--losers", losers]
    assert run("convert", "folders", *flags, "--output_dir", tmp_path / "out") == 0
    assert shades(load(tmp_path / "out")) == [(10, 20, "a cat, asleep"), (11, 21, "\U0001f63a")]
    skipped = [record.getMessage() for record in caplog.records]
    for path in (
        winners / "alone.png",
        losers / "left.png",
        winners / "silent.webp",
        winners / "latin.png",
        winners / "notes.doc",
    ):
        assert sum(message.startswith(f"skipped {path}: ") for message in skipped) == 1
    assert len(skipped) == 5 and "skipped 2: its caption file cannot be read" in capsys.readouterr().out

    (losers / "a.webp").write_bytes(png(1))
    assert run("convert", "folders", *flags, "--output_dir", tmp_path / "new") == 2
    assert f"{losers}/a.png and {losers}/a.webp have the same name" in capsys.readouterr().err


@pytest.mark.bad_input
def test_conversions_do_not_follow_links_out_of_a_folder(tmp_path, caplog):
    outside, folders = tmp_path / "outside", [tmp_path / "winners", tmp_path / "losers"]
    for folder in (outside, *folders):
        folder.mkdir()
        for name in "abc":
            (folder / f"{name}.png").write_bytes(png(7))
            (folder / f"{name}.txt").write_text(f"{folder.name} {name}")
    for link in (folders[0] / "b.png", folders[0] / "c.txt", folders[1] / "more"):
        link.unlink(missing_ok=True)
        link.symlink_to(outside / link.name if link.suffix else outside)
    # A link within the folder, and a folder that is a link itself.
    (folders[1] / "a.png").rename(folders[1] / "real.webp")
    (folders[1] / "a.png").symlink_to(folders[1] / "real.webp")
    folders[0].rename(tmp_path / "renamed")
    folders[0].symlink_to(tmp_path / "renamed")
    flags = ["--winners", folders[0], "--losers", folders[1], "--output_dir", tmp_path / "out"]
    assert run("convert", "folders", *flags) == 0
    assert [row["caption"] for row in load(tmp_path / "out")] == ["winners a"]
    for link in (folders[0] / "b.png", folders[1] / "more", folders[0] / "c.png"):
        assert any(message.startswith(f"skipped {link}: ") for message in caplog.messages)

    metadata = {"image_0_uid": ["a", "b"], "image_1_uid": ["c", "a"], "label_0": [1.0, 1.0], "caption": ["p", "p"]}
    folder = write_parquet(tmp_path / "metadata", metadata)
    flags = ["--dataset_name", folder, "--images_dir", folders[0], "--output_dir", tmp_path / "new"]
    assert run("convert", "pick_a_pic", *flags) == 0
    assert len(load(tmp_path / "new")) == 1
    assert caplog.messages[-1].startswith("skipped row 1: ") and "uid b" in caplog.messages[-1]


@pytest.mark.parametrize("images", ["files", "dataset"])
def test_convert_pick_a_pic(tmp_path, caplog, images):
    created = pd.Timestamp("2023-03-20 10:00:00.123456789")
    metadata = {
        "image_0_uid": ["u1", "u2", "u3", "u1", "u1"],
        "image_1_uid": ["u2", "u3", "gone", "u3", "u2"],
        "label_0": [1.0, 0.0, 1.0, 0.5, 3.0],
        "label_1": [0.0, 1.0, 0.0, 0.5, 0.0],
        "caption": ["a", "a", "b", "a", "a"],
        "ranking_id": [5, 6, 7, 8, 9],
        "created_at": [created] * 5,
    }
    (tmp_path / "metadata").mkdir()
    pd.DataFrame(metadata).to_parquet(tmp_path / "metadata" / "train.parquet")
    if images == "files":
        (tmp_path / "images" / "deep").mkdir(parents=True)
        for number, name in enumerate(("u1.jpg", "deep/u2.png", "u3.webp", "u9.png"), start=1):
            (tmp_path / "images" / name).write_bytes(png(number))
        flags = ["--images_dir", tmp_path / "images"]
    else:
        columns = {"key": ["u3", "u1", "u2"], "picture": [png(3), png(1), png(2)]}
        folder = write_parquet(tmp_path / "images", columns)
        flags = ["--images_dataset", folder, "--uid_column", "key", "--image_column", "picture"]
    flags += ["--dataset_name", tmp_path / "metadata"]
    assert run("convert", "pick_a_pic", *flags, "--output_dir", tmp_path / "out") == 0
    dataset = load(tmp_path / "out")
    assert [(shade(row["jpg_0"]), shade(row["jpg_1"]), row["label_0"]) for row in dataset] == [
        (1, 2, 1.0),
        (2, 3, 0.0),
        (1, 3, 0.5),
    ]
    assert dataset["ranking_id"][:] == [5, 6, 8]
    assert pd.read_parquet(next((tmp_path / "out").iterdir()))["created_at"].tolist() == [created] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "skipped row 2: no image of uid gone",
        "skipped row 4: the label is 3.0, but must be 1, 0, or 0.5 for a tie",
    ]


def test_filter_then_convert_pick_a_pic(tmp_path):
    rows = random_metadata(100, seed=6)
    folder = write_parquet(tmp_path / "metadata", pd.DataFrame(rows).to_dict("list"))
    uids = sorted({row[f"image_{index}_uid"] for row in rows for index in (0, 1)})
    images = write_parquet(tmp_path / "images", {"uid": uids, "image": [png(value) for value in range(len(uids))]})
    kept = tmp_path / "kept.parquet"
    assert run("filter", "--dataset_name", folder, "--output_file", kept) == 0
    flags = ["--dataset_name", kept, "--images_dataset", images]
    assert run("convert", "pick_a_pic", *flags, "--output_dir", tmp_path / "out") == 0
    dataset = load(tmp_path / "out")
    assert dataset["row"][:] == filter_slowly(rows, 1, "all", None, None)
    for row in dataset:
        assert (uids[shade(row["jpg_0"])], uids[shade(row["jpg_1"])]) == (row["image_0_uid"], row["image_1_uid"])


@pytest.mark.bad_input
def test_convert_pick_a_pic_needs_images_from_one_place(tmp_path, capsys):
    rows = random_metadata(16, seed=4)
    folder = write_parquet(tmp_path / "data", pd.DataFrame(rows).to_dict("list"))
    assert run("convert", "pick_a_pic", "--dataset_name", folder, "--output_dir", tmp_path / "out") == 2
    assert "give either --images_dir or --images_dataset" in capsys.readouterr().err
    flags = ["--images_dataset", folder, "--output_dir", tmp_path / "out"]
    assert run("convert", "pick_a_pic", "--dataset_name", folder, *flags) == 2
    assert "has no column 'uid' (--uid_column)" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_filter_then_convert_rows(tmp_path, capsys, source):
    metadata = random_metadata(100, seed=5)
    rows = [
        {"jpg_0_file_name": png(2 * index), "jpg_1_file_name": png(2 * index + 1), **row}
        for index, row in enumerate(metadata)
    ]
    if source == "folder":
        flags = ["--train_data_dir", write_image_folder(tmp_path / "data", rows)]
    else:
        columns = pair_columns(100, **pd.DataFrame(metadata).to_dict("list"))
        flags = ["--dataset_name", write_parquet(tmp_path / "data", columns, num_files=3)]
    kept = tmp_path / "kept.parquet"
    assert run("filter", *flags, "--losers", "latest", "--output_file", kept) == 0
    assert run("convert", "rows", "--rows_file", kept, *flags, "--output_dir", tmp_path / "out") == 0
    expected = filter_slowly(metadata, 1, "latest", None, None)
    dataset = load(tmp_path / "out")
    assert dataset["row"][:] == expected and len(expected) > 5
    for row in dataset:
        assert (shade(row["jpg_0"]), shade(row["jpg_1"])) == (2 * row["row"], 2 * row["row"] + 1)
        assert {name: row[name] for name in metadata[0]} == metadata[row["row"]]
    assert run("check", "--dataset_name", tmp_path / "out", "--num_proc", 1) == 0
    assert run("filter", "--dataset_name", tmp_path / "out", "--output_file", tmp_path / "again.parquet") == 0
    assert pd.read_parquet(tmp_path / "again.parquet")["row"].tolist() == list(range(len(expected)))

    # Other data than those that were filtered: too short, and of the same length.
    short = write_image_folder(tmp_path / "short", rows[: expected[-1]])
    flags = ["--train_data_dir", short, "--output_dir", tmp_path / "new"]
    assert run("convert", "rows", "--rows_file", kept, *flags) == 2
    assert f"row {expected[-1]} of {kept} is beyond the end" in capsys.readouterr().err
    flags[1] = write_image_folder(tmp_path / "other", rows[::-1])
    assert run("convert", "rows", "--rows_file", kept, *flags) == 2
    assert f"row {expected[0]} of {kept} has " in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.bad_input
def test_encoded_bytes(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png(5))
    (tmp_path / "outside.png").write_bytes(png(6))
    args = parse_args(["convert", "pairs", "--dataset_name", str(tmp_path / "data"), "--output_dir", "new"])
    path = tmp_path / "data" / "a.png"
    for value in (
        png(5),
        {"bytes": png(5), "path": "elsewhere.png"},
        path,
        str(path),
        {"bytes": None, "path": str(path)},
    ):
        assert encoded_bytes(value) == encoded_bytes(value, args) == png(5)
    assert encoded_bytes("a.png", args) == png(5)
    # A file that was found may lie anywhere, one that the data name must lie with them.
    assert encoded_bytes(tmp_path / "outside.png", args) == png(6)
    for value, message in (
        (None, "null instead of an image"),
        ({"bytes": None, "path": None}, "null instead of an image"),
        (3, "3 instead of an image"),
        (b"", "empty, 0 bytes"),
        (base64.b64encode(bytes(1000)).decode(), "base64"),
        ({"bytes": None, "path": "../outside.png"}, "../outside.png"),
        (str(tmp_path / "outside.png"), "outside.png"),
    ):
        with pytest.raises(ValueError, match=message):
            encoded_bytes(value, args)


# What tools share


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_parquet_files_are_read_as_one_dataset(tmp_path, batch_size):
    dataset = Dataset.from_dict({"number": list(range(40)), "image": [png(value) for value in range(40)]})
    for index in range(3):
        shard = dataset.shard(3, index, contiguous=True)
        shard.to_parquet(str(tmp_path / f"train-{index}.parquet"), batch_size=5)
    files = ParquetFiles(f"file://{path}" for path in sorted(tmp_path.glob("*.parquet")))
    assert files.features == dataset.features
    rng = random.Random(0)
    for rows in (None, [], [0], [39], [13, 14], [39, 50], *(sorted(rng.sample(range(40), 9)) for _ in range(9))):
        selected = files if rows is None else files.select(rows)
        tables = list(selected.select_columns(["number"]).iter(batch_size))
        assert all(0 < len(table) <= batch_size for table in tables)
        numbers = [number for table in tables for number in table["number"].to_pylist()]
        assert numbers == [row for row in (range(40) if rows is None else rows) if row < 40]


def test_parquet_files_are_opened_only_if_needed(tmp_path):
    for index in range(3):
        Dataset.from_dict({"number": [index] * 10}).to_parquet(str(tmp_path / f"{index}.parquet"))
    files = ParquetFiles(map(str, sorted(tmp_path.glob("*.parquet"))))
    for index in (1, 2):
        (tmp_path / f"{index}.parquet").unlink()
    assert [len(table) for table in files.select([2, 9]).iter(100)] == [2]
    with pytest.raises(ValueError, match="1.parquet"):
        list(files.select([10]).iter(100))


def test_shards_replace_others_only_when_they_are_whole(tmp_path):
    def pairs(count):
        for value in range(count):
            if value == 2:
                raise OSError("no room")
            yield {
                "jpg_0": {"bytes": png(value)},
                "jpg_1": {"bytes": png(value)},
                "label_0": 1.0,
                "caption": str(value),
            }

    first = tmp_path / "train-00000-of-00001.parquet"
    others = [tmp_path / name for name in ("train-00001-of-00002.parquet", "train-mine.parquet")]
    for path in (first, *others):
        path.write_bytes(b"before")
    for count, error in ((0, ValueError), (3, OSError)):
        with pytest.raises(error):
            write_shards(pairs(count), common.SCHEMA, tmp_path, 1 << 20, replaced=[first, others[0]])
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (first, *others)}
        assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"before"}
    assert write_shards(pairs(2), common.SCHEMA, tmp_path, 1 << 20, replaced=[first, others[0]]) == (2, 1)
    assert {path.name for path in tmp_path.iterdir()} == {first.name, others[1].name}
    assert pq.read_table(first)["caption"].to_pylist() == ["0", "1"]


def test_a_file_appears_when_it_is_whole(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(OSError), common.whole_file(tmp_path / "file") as path:
        path.write_text("half")
        raise OSError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    with common.whole_file(tmp_path / "file") as path:
        path.write_text("after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["after"]


def test_conversions_as_a_command(tmp_path, capsys, caplog, monkeypatch):
    columns = {"prompt": ["a", None], "chosen": [png(1), png(2)], "rejected": [png(3), png(4)]}
    folder = write_parquet(tmp_path / "data", columns)
    command = ["convert", "pairs", "--dataset_name", folder, "--output_dir", tmp_path / "out"]
    assert run_tool(monkeypatch, SCRIPT, *command) == 0
    assert capsys.readouterr().out == f"1 pairs in 1 files in {tmp_path / 'out'}\nskipped 1: no caption\n"
    assert caplog.messages == ["skipped row 1: the caption is null, but must be a text"]
    assert run_tool(monkeypatch, SCRIPT, *command) == 2
    assert f"error: --output_dir {tmp_path / 'out'} is not empty; give a new folder\n" in capsys.readouterr().err


def test_images_beside_a_parquet_file(tmp_path, caplog):
    """Files that a dataset names are looked for in the folder that its parquet file is in."""
    (tmp_path / "outside.png").write_bytes(png(3))
    columns = {"prompt": ["a", "b"], "chosen": ["1.png", "1.png"], "rejected": ["2.png", "../outside.png"]}
    file = next(write_parquet(tmp_path / "data", columns).iterdir())
    for number in (1, 2):
        (tmp_path / "data" / f"{number}.png").write_bytes(png(number))
    for name in (file, tmp_path / "data"):
        folder = tmp_path / f"out-{name.name}"
        assert run("convert", "pairs", "--dataset_name", name, "--output_dir", folder) == 0
        assert shades(load(folder)) == [(1, 2, "a")]
        assert caplog.messages[-1].startswith("skipped row 1: ../outside.png ")
