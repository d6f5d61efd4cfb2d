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

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value, load_dataset
from PIL import Image
from conftest import ROOT
from tiny_checkpoints import build_tokenizer

import prepare_preferences
from prepare_preferences import image_bytes, main, pair_ranks, parse_args, row_groups


SCRIPT = ROOT / "tools" / "prepare_preferences.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def run(*arguments):
    return main(parse_args([str(argument) for argument in arguments]))


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


# ---- check ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["binary", "image", "folder"])
def test_check_of_good_pairs(tmp_path, capsys, source):
    columns = pair_columns(6)
    columns["label_0"][5] = 0.5
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
    assert table_row(output, "most common sizes") == "8x8 (11), 16x32 (1)"
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
    "text": (lambda: b"this is no picture", "not in an image format"),
    "bomb": (bomb, "400000000 pixels"),
    "missing": (lambda: "missing.png", "No such file"),
    "leaves the folder": (lambda: "../outside.png", "leaves the folder"),
    "absolute": (lambda: "/etc/hostname", "leaves the folder"),
    "null": (lambda: None, "the file name is null"),
    "number": (lambda: 7, "the file name is of type int"),
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
def test_check_finds_bad_images_first_last_and_in_worker_processes(tmp_path, capsys):
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
    rows = good_rows(11)
    for row, label in zip(rows, (None, float("nan"), "1", 2, [1])):
        row["label_0"] = label
    for row, caption in zip(rows[5:], (None, "", ["a list"], "x" * 10_000, "\U0001f63a")):
        row["caption"] = caption
    folder = write_image_folder(tmp_path / "data", rows)
    assert run("check", "--train_data_dir", folder, "--num_proc", 1) == 1
    output = capsys.readouterr().out
    assert re.findall(r"row (\d+), the label is (.*);", output) == [
        ("0", "null"),
        ("1", "nan"),
        ("2", "of type str"),
        ("3", "2"),
        ("4", "of type list"),
    ]
    assert re.findall(r"row (\d+), the caption is (.*);", output) == [("5", "null"), ("7", "of type list")]
    assert "empty captions:\n  row 6\n" in output
    assert "Not fit for training: 5 bad labels, 2 bad captions." in output


def test_empty_and_long_captions_alone_do_not_stop_training(tmp_path, capsys):
    folder = write_parquet(tmp_path / "data", pair_columns(3, caption=["", "  ", "x" * 10_000]))
    assert run("check", "--dataset_name", folder, "--num_proc", 1) == 0
    assert table_row(capsys.readouterr().out, "empty captions").startswith("2 ")


def test_check_counts_tokens(tmp_path, capsys):
    build_tokenizer(tmp_path / "model" / "tokenizer")
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
    ]
    jpg_0, jpg_1, labels, captions = zip(*pairs)
    columns = {"jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": [float(label) for label in labels], "caption": captions}
    folder = write_parquet(tmp_path / "data", columns)
    assert run("check", "--dataset_name", folder, "--num_proc", 1) == 0
    output = capsys.readouterr().out
    assert "duplicate pairs:\n  rows 0, 1\n" in output
    assert "contradicting pairs:\n  rows 0, 1 against 2\n  rows 4 against 5\n" in output
    assert "identical images:\n  row 6\n" in output


def test_check_lists_as_many_findings_as_asked(tmp_path, capsys):
    folder = write_parquet(tmp_path / "data", pair_columns(5, jpg_0=[b"bad"] * 5))
    assert run("check", "--dataset_name", folder, "--num_proc", 1, "--max_listed", 2) == 1
    output = capsys.readouterr().out
    assert "row 1, jpg_0" in output and "row 2, jpg_0" not in output and "and 3 more" in output


@pytest.mark.parametrize("source", ["folder", "parquet", "ties"])
@pytest.mark.bad_input
def test_check_without_a_pair(tmp_path, capsys, source):
    if source == "folder":
        flags = ["--train_data_dir", write_image_folder(tmp_path / "data", [])]
    elif source == "ties":
        flags = ["--dataset_name", write_parquet(tmp_path / "data", pair_columns(2, label_0=[0.5, 0.5]))]
    else:
        features = Features({name: Value("binary") for name in ("jpg_0", "jpg_1")})
        features.update(label_0=Value("float64"), caption=Value("string"))
        flags = ["--dataset_name", write_parquet(tmp_path / "data", {name: [] for name in features}, 1, features)]
    assert run("check", *flags, "--num_proc", 1) == 1
    assert "Not fit for training: no pair is left." in capsys.readouterr().out


def test_check_as_a_command(tmp_path):
    folder = write_image_folder(tmp_path / "data", good_rows(3))
    (folder / "1_jpg_0_file_name.png").write_bytes(b"")
    command = [sys.executable, str(SCRIPT), "check", "--num_proc", "2", "--train_data_dir"]
    result = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert result.returncode == 1 and "row 1, jpg_0: 1_jpg_0_file_name.png: empty, 0 bytes" in result.stdout
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    message = "does not exist; --train_data_dir needs it, with one JSON object per line"
    assert result.stderr == f"error: {tmp_path}/metadata.jsonl {message}\n"


# ---- Errors of the input as a whole ---------------------------------------------------------------------------------


@pytest.mark.bad_input
def test_errors_name_the_flag_column_file_or_row(tmp_path, capsys):
    folder = write_parquet(tmp_path / "data", pair_columns(4))
    images = write_image_folder(tmp_path / "images", good_rows(2))
    broken = write_image_folder(tmp_path / "broken", good_rows(1))
    with open(broken / "metadata.jsonl", "a") as file:
        file.write('\n["no object"]\n')
    damaged = write_parquet(tmp_path / "damaged", pair_columns(2))
    (damaged / "train-1.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    wider = write_parquet(tmp_path / "wider", pair_columns(2))
    Dataset.from_dict(pair_columns(2, extra=[1, 2])).to_parquet(str(wider / "train-1.parquet"))
    halves = write_parquet(tmp_path / "halves", pair_columns(2, label_0=[0, 1]))
    Dataset.from_dict(pair_columns(2, label_0=[0.5, 1.0])).to_parquet(str(halves / "train-1.parquet"))
    a_file = folder / "train-00000-of-00001.parquet"
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    cases = [
        (["check"], "give either --dataset_name or --train_data_dir"),
        (["check", "--dataset_name", folder, "--train_data_dir", images], "and not both"),
        (["check", "--dataset_name", tmp_path / "nothing"], "nothing does not exist"),
        (["check", "--dataset_name", folder, "--dataset_split_name", "dev"], "split dev"),
        (["check", "--dataset_name", damaged], "damaged/train-1.parquet: "),
        (["check", "--dataset_name", wider], "wider/train-1.parquet: it has extra, which "),
        (["check", "--dataset_name", halves], "halves/train-1.parquet: Float value 0.5"),
        (["check", "--dataset_name", a_file], "is a file; for training give the folder that it is in"),
        (["check", "--dataset_name", folder, "--pretrained_model_name_or_path", "./none"], "none"),
        (["filter", "--dataset_name", folder, "--output_file", a_file], "parquet exists; give a new file"),
        (["check", "--dataset_name", folder, "--image_1_column", "b"], "has no column 'b' (--image_1_column)"),
        (["check", "--train_data_dir", images, "--image_0_column", "a"], "no column 'a_file_name' (--image_0_column)"),
        (["check", "--train_data_dir", images, "--label_column", "win"], "no column 'win' (--label_column)"),
        (["check", "--train_data_dir", broken], "metadata.jsonl, line 3: not a JSON object"),
        (["filter", "--dataset_name", folder, "--output_file", full / "x"], "no column 'image_0_uid' (--image_0_uid"),
        (["convert", "pairs", "--dataset_name", folder, "--output_dir", full], "full is not empty"),
        (
            ["convert", "pairs", "--dataset_name", folder, "--output_dir", "new"],
            "no column 'prompt' (--caption_column)",
        ),
        (["convert", "folders", "--winners", full, "--losers", "none", "--output_dir", "new"], "none is not a folder"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error, (arguments, error)


@pytest.mark.parametrize("flag", ["--min_wins", "--max_pairs_per_prompt"])
@pytest.mark.bad_input
def test_counts_are_positive(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args(["filter", "--dataset_name", "x", "--output_file", "y", flag, "0"])
    assert exit.value.code == 2 and flag in capsys.readouterr().err


# ---- filter ---------------------------------------------------------------------------------------------------------


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
                for own, other, score in (("0", "1", row["label_0"]), ("1", "0", 1 - row["label_0"])):
                    results.setdefault(row[f"image_{own}_uid"], []).append((score, index))
        of_prompt = []
        for wins in results.values():
            if all(score == 1 for score, _ in wins) and len(wins) >= min_wins:
                indices = [index for _, index in wins]
                if losers == "latest":
                    indices = [max(indices, key=lambda index: (rows[index][order] if order else 0, index))]
                of_prompt += [(-len(wins), index) for index in indices]
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
    rows = random_metadata(80, seed=2)
    (tmp_path / "data").mkdir()
    frame = pd.DataFrame(rows)
    if suffix == "csv":
        frame.to_csv(tmp_path / "data" / "train.csv", index=False)
    else:
        frame.to_json(tmp_path / "data" / "train.jsonl", orient="records", lines=True)
    assert run("filter", "--dataset_name", tmp_path / "data", "--output_file", tmp_path / "kept.parquet") == 0
    assert pd.read_parquet(tmp_path / "kept.parquet")["row"].tolist() == filter_slowly(rows, 1, "all", None, None)


def test_filter_of_an_image_folder_goes_by_file_names(tmp_path):
    rows = good_rows(4)
    shared = {"jpg_0_file_name": "a.png", "caption": "same", "label_0": 1}
    rows = [{**row, **shared, "jpg_1_file_name": f"{index}.png"} for index, row in enumerate(rows)]
    rows[3].update(jpg_0_file_name="0.png", jpg_1_file_name="1.png")  # 0.png wins here, and lost to a.png
    folder = write_image_folder(tmp_path / "data", rows)
    flags = ["--image_0_uid_column", "jpg_0_file_name", "--image_1_uid_column", "jpg_1_file_name"]
    kept = tmp_path / "kept.parquet"
    assert run("filter", "--train_data_dir", folder, "--output_file", kept, *flags) == 0
    assert pd.read_parquet(kept)["row"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label_0", 2.0, "row 5: the label is 2.0"),
        ("label_0", None, "row 5: label_0 (--label_column) is null"),
        ("caption", None, "row 5: caption (--caption_column) is null"),
        ("image_1_uid", None, "row 5: image_1_uid (--image_1_uid_column) is null"),
    ],
)
@pytest.mark.bad_input
def test_filter_names_rows_that_it_cannot_judge(tmp_path, capsys, column, value, message):
    rows = random_metadata(16, seed=3)
    rows[5][column] = value
    folder = write_parquet(tmp_path / "data", {name: [row[name] for row in rows] for name in rows[0]})
    assert run("filter", "--dataset_name", folder, "--output_file", tmp_path / "kept.parquet") == 2
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
    assert "metadata.jsonl mixes types in a column" in capsys.readouterr().err
    folder = write_image_folder(tmp_path / "empty", [])
    assert run("filter", "--train_data_dir", folder, "--output_file", kept) == 2
    assert "the dataset has no rows" in capsys.readouterr().err


@pytest.mark.bad_input
def test_filter_that_keeps_nothing_writes_nothing(tmp_path, capsys):
    rows = random_metadata(16, seed=3)
    folder = write_parquet(tmp_path / "data", pd.DataFrame(rows).to_dict("list"))
    kept = tmp_path / "kept.parquet"
    assert run("filter", "--dataset_name", folder, "--output_file", kept, "--min_wins", 99) == 2
    assert "no pair is left" in capsys.readouterr().err and not kept.exists()


# ---- convert --------------------------------------------------------------------------------------------------------


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
    assert len(skipped) == 3 and skipped[0] == "skipped row 1: the caption is null; it must be text"
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

    monkeypatch.setattr(prepare_preferences, "ROW_GROUP_SIZE", 1)
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
        "skipped row 5: the caption is null; it must be text",
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
    (tmp_path / "elsewhere").mkdir()
    for folder, shade in ((winners, 10), (losers, 20)):
        folder.mkdir()
        (folder / "sub").mkdir() if folder == winners else (folder / "sub").symlink_to(tmp_path / "elsewhere")
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
        "skipped row 4: the label is 3.0; it must be 1, 0 or 0.5",
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
    assert f"has row {expected[-1]}, which is beyond the end" in capsys.readouterr().err
    flags[1] = write_image_folder(tmp_path / "other", rows[::-1])
    assert run("convert", "rows", "--rows_file", kept, *flags) == 2
    assert f"row {expected[0]} has " in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


def test_image_bytes_takes_what_datasets_hold(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    for value in (
        png(5),
        {"bytes": png(5), "path": "elsewhere.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ):
        assert image_bytes(value) == png(5)
    assert image_bytes(str(tmp_path / "a.png")) == png(5)
    for value in (None, 3, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="instead of an image"):
            image_bytes(value)


def test_conversions_log_to_the_terminal(tmp_path):
    columns = {"prompt": ["a", None], "chosen": [png(1), png(2)], "rejected": [png(3), png(4)]}
    folder = write_parquet(tmp_path / "data", columns)
    command = [sys.executable, str(SCRIPT), "convert", "pairs", "--dataset_name", str(folder)]
    result = subprocess.run([*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "skipped row 1: the caption is null; it must be text" in result.stderr
    assert result.stdout == f"1 pairs in 1 files in {tmp_path / 'out'}\nskipped 1: no caption\n"
