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


import itertools
import json
import math
import random

import collect_preferences
import judging
import numpy as np
import prepare_preferences
import pyarrow.parquet as pq
import pytest
from common import exit_code, locked_folder
from conftest import reset_accelerate, run_on_two_processes
from PIL import Image
from tiny_checkpoints import encoded, write_parquet


# Each looks at one colour. They are stopped by a file beside theirs, after so many calls.
SCORERS = """
from pathlib import Path

def score(images, channel):
    stop = Path(__file__).with_name("stop")
    if stop.is_file():
        number = int(stop.read_text())
        if number == 0:
            raise RuntimeError("stopped")
        stop.write_text(str(number - 1))
    return [image.getpixel((0, 0))[channel] / 10 for image in images]

def red(images, prompts):
    return score(images, 0)

def green(images, prompts):
    return score(images, 1)

def blue(images, prompts):
    return score(images, 2)
"""


def make_columns(num_pairs, seed=0):
    """Pairs of pictures of one colour, some of which come again, with every seventh row a tie."""
    rng = random.Random(seed)
    colours = [tuple(rng.randrange(0, 256, 5) for _ in range(3)) for _ in range(num_pairs)]
    images = [[rng.choice(colours) for _ in range(2)] for _ in range(num_pairs)]
    return {
        "jpg_0": [encoded(Image.new("RGB", (8, 8), first)) for first, _ in images],
        "jpg_1": [encoded(Image.new("RGB", (8, 8), second)) for _, second in images],
        "label_0": [0.5 if index % 7 == 6 else float(rng.random() < 0.5) for index in range(num_pairs)],
        "caption": [f"a picture {index % 5}" for index in range(num_pairs)],
        "ranking_id": list(range(num_pairs)),
        "model_0": [None] * num_pairs,
        "model_1": ["a model"] * num_pairs,
        "probability_0": ["of an earlier judging"] * num_pairs,
    }, images


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Runs `judge` on pairs that exist, in this process; options that are `None` are left out."""
    monkeypatch.setattr(judging, "SHARD_SIZE", 20)
    (tmp_path / "mine.py").write_text(SCORERS)

    def words(**options):
        options = {"scorers": ["red", "green", "blue"], "output_dir": tmp_path / "judged", **options}
        options["scorers"] = [f"{tmp_path / 'mine.py'}:{name}" for name in options["scorers"]]
        words = ["judge"]
        for name, value in options.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [] if value is None else [f"--{name}", *map(str, values)]
        return words

    def run(**options):
        reset_accelerate()
        return exit_code(collect_preferences.main, collect_preferences.parse_args(words(**options)))

    run.words = words
    return run


def read_rows(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def expected_rows(labels, images, keep, relabel):
    """What a direct computation keeps: `{row: (label, whether all scorers agree with it)}`."""
    kept = {}
    for row, (label, (first, second)) in enumerate(zip(labels, images)):
        votes = [(a > b) - (a < b) for a, b in zip(first, second)]
        side = {0: -1, 1: 1, 0.5: 0}[label]
        if relabel and side != 0 and votes == [-side] * 3:
            side = -side
        num_agree = votes.count(side) if side else 0
        if num_agree >= {"agree": 3, "majority": 2, "all": 0}[keep]:
            kept[row] = (side + 1) / 2, None if side == 0 else num_agree == 3
    return kept


@pytest.mark.parametrize("relabel", [False, True], ids=["as_labelled", "relabel"])
@pytest.mark.parametrize("keep", ["agree", "majority", "all"])
def test_kept_pairs_are_those_of_a_direct_computation(judge, tmp_path, keep, relabel, capsys):
    columns, images = make_columns(60)
    dataset = write_parquet(tmp_path / "data", columns)
    assert judge(dataset_name=dataset, keep=keep, relabel=relabel or None) == 0
    expected, rows = expected_rows(columns["label_0"], images, keep, relabel), read_rows(tmp_path / "judged")
    assert {row["ranking_id"]: (row["label_0"], row["scorers_agree"]) for row in rows} == expected
    assert [row["ranking_id"] for row in rows] == sorted(expected)
    for row in rows:
        number = row["ranking_id"]
        margins = []
        for k, name in enumerate(("red", "green", "blue")):
            for side in (0, 1):
                assert row[f"jpg_{side}"]["bytes"] == columns[f"jpg_{side}"][number]
                assert row[f"mine.{name}_{side}"] == images[number][side][k] / 10
            margins.append(row[f"mine.{name}_margin"])
            assert margins[-1] == row[f"mine.{name}_0"] - row[f"mine.{name}_1"]
        probability = np.mean([1 / (1 + math.exp(-margin)) for margin in margins])
        assert row["probability_0"] == pytest.approx(probability)
        assert row["caption"] == columns["caption"][number] and row["scorers"].count("mine.py:") == 3
        assert relabel == ("relabelled" in row)
        if relabel:
            assert row["relabelled"] == (row["label_0"] != columns["label_0"][number])
    report = (tmp_path / "judged" / "report.md").read_text(encoding="utf-8")
    num_pairs = 60 if keep == "all" else 52
    assert f"| pairs | {num_pairs} |" in report and f"| kept (--keep {keep}) | {len(expected)} |" in report
    assert f"| relabelled | {sum(row.get('relabelled', False) for row in rows)} |" in report
    unanimous = expected_rows(columns["label_0"], images, "agree", False)
    assert f"| all scorers agree with the label | {len(unanimous)} |" in report
    capsys.readouterr()
    words = ["check", "--dataset_name", str(tmp_path / "judged"), "--preference_probability_column", "probability_0"]
    assert prepare_preferences.main(prepare_preferences.parse_args(words)) == 0
    ties = sum(row["label_0"] == 0.5 for row in rows)
    assert f"{len(rows) - ties}  with a preference" in capsys.readouterr().out


def test_a_majority_is_more_than_half(judge, tmp_path):
    columns, images = make_columns(40)
    assert (
        judge(dataset_name=write_parquet(tmp_path / "data", columns), scorers=["red", "green"], keep="majority") == 0
    )
    votes = [[np.sign(a - b) for a, b in zip(*pair)][:2] for pair in images]
    wanted = [row for row, label in enumerate(columns["label_0"]) if votes[row] == [2 * label - 1] * 2]
    assert [row["ranking_id"] for row in read_rows(tmp_path / "judged")] == wanted


def test_an_interrupted_judging_goes_on(judge, tmp_path):
    columns, _ = make_columns(60)
    dataset = write_parquet(tmp_path / "data", columns)
    assert judge(dataset_name=dataset, output_dir=tmp_path / "whole") == 0
    # In the second of three files.
    (tmp_path / "stop").write_text("12")
    with pytest.raises(RuntimeError, match="failed for"):
        judge(dataset_name=dataset)
    folder = tmp_path / "judged"
    assert len(list(folder.glob("train-*.parquet"))) == 1 and not list(folder.rglob("*.incomplete"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("train-*")}
    (tmp_path / "stop").unlink()
    assert judge(dataset_name=dataset) == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("train-*")}.items()
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (folder / path.relative_to(tmp_path / "whole")).read_bytes(), path
    # Nothing is left to judge, so nothing is scored.
    (tmp_path / "stop").write_text("0")
    assert judge(dataset_name=dataset) == 0


@pytest.mark.bad_input
def test_replaced_images_beside_a_parquet_file_are_refused(judge, tmp_path, capsys):
    columns, _ = make_columns(60)
    files = {f"{column}-{index}.png": columns[column][index] for column in ("jpg_0", "jpg_1") for index in range(60)}
    for column in ("jpg_0", "jpg_1"):
        columns[column] = [{"bytes": None, "path": f"{column}-{index}.png"} for index in range(60)]
    dataset = write_parquet(tmp_path / "data", columns)
    for name, data in files.items():
        (tmp_path / "data" / name).write_bytes(data)
    (tmp_path / "stop").write_text("12")
    with pytest.raises(RuntimeError, match="failed for"):
        judge(dataset_name=dataset)
    (tmp_path / "stop").unlink()
    (tmp_path / "data/jpg_0-1.png").write_bytes(files["jpg_1-2.png"])
    assert judge(dataset_name=dataset) == 2
    assert "images" in capsys.readouterr().err


def test_processes_share_the_pairs(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "SHARD_SIZE", 256)
    columns, _ = make_columns(300)
    options = {"dataset_name": write_parquet(tmp_path / "data", columns), "keep": "all"}
    assert judge(**options, output_dir=tmp_path / "one") == 0
    words = judge.words(**options, output_dir=tmp_path / "two")
    codes, log = run_on_two_processes("tools/collect_preferences.py", words, tmp_path / "log")
    assert codes == [0, 0], log
    assert [row["ranking_id"] for row in read_rows(tmp_path / "two")] == list(range(300))
    for path in (tmp_path / "one").rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_a_picture_is_scored_once_under_its_prompt(judge, tmp_path, monkeypatch):
    columns = {name: values * 10 for name, values in make_columns(2)[0].items()}
    (tmp_path / "stop").write_text("1")
    assert judge(dataset_name=write_parquet(tmp_path / "data", columns), scorers=["red"], keep="all") == 0
    assert len(read_rows(tmp_path / "judged")) == 20


def test_pairs_of_a_folder(judge, tmp_path):
    columns, images = make_columns(30)
    folder = tmp_path / "data"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for index in range(30):
            row = {name: columns[name][index] for name in ("label_0", "caption", "ranking_id")}
            for side in (0, 1):
                row[f"jpg_{side}_file_name"] = f"{index}-{side}.png"
                (folder / f"{index}-{side}.png").write_bytes(columns[f"jpg_{side}"][index])
            file.write(json.dumps(row) + "\n")
    assert judge(train_data_dir=folder, max_train_samples=20) == 0
    rows = read_rows(tmp_path / "judged")
    winners = [row for row, label in enumerate(columns["label_0"]) if label != 0.5][:20]
    expected = expected_rows(columns["label_0"], images, "agree", False)
    assert [row["ranking_id"] for row in rows] == [row for row in winners if row in expected]
    for row in rows:
        assert row["jpg_1"]["bytes"] == columns["jpg_1"][row["ranking_id"]]
        assert row["jpg_1_file_name"] == f"{row['ranking_id']}-1.png"


def test_columns_of_other_names(judge, tmp_path):
    columns, images = make_columns(30)
    folder = tmp_path / "data"
    for side in (0, 1):
        # Images may be named by paths.
        columns[f"side_{side}"] = [f"{index}-{side}.png" for index in range(30)]
    encoded_images = {side: columns.pop(f"jpg_{side}") for side in (0, 1)}
    columns["better"], columns["text"] = columns.pop("label_0"), columns.pop("caption")
    dataset = write_parquet(folder, columns)
    for side, index in itertools.product((0, 1), range(30)):
        (folder / f"{index}-{side}.png").write_bytes(encoded_images[side][index])
    options = {
        "image_0_column": "side_0",
        "image_1_column": "side_1",
        "label_column": "better",
        "caption_column": "text",
    }
    assert judge(dataset_name=dataset, **options) == 0
    rows = read_rows(tmp_path / "judged")
    assert [row["ranking_id"] for row in rows] == list(expected_rows(columns["better"], images, "agree", False))
    assert {"side_0", "better", "text"}.isdisjoint(rows[0]) and rows[0]["caption"].startswith("a picture")
    assert all(row["jpg_0"]["bytes"] == encoded_images[0][row["ranking_id"]] for row in rows)


def test_unreadable_pairs(judge, tmp_path, capsys, caplog):
    columns, images = make_columns(30)
    columns["jpg_1"][3] = b"\x89PNG"
    dataset = write_parquet(tmp_path / "data", columns)
    assert judge(dataset_name=dataset) == 2
    assert "Row 3 ('a picture 3'): jpg_1 cannot be read as an image" in capsys.readouterr().err
    # The same folder goes on.
    assert judge(dataset_name=dataset, on_bad_sample="skip") == 0
    assert "Row 3 ('a picture 3'): jpg_1" in caplog.text and "The pair is left out" in caplog.text
    expected = expected_rows(columns["label_0"], images, "agree", False)
    assert [row["ranking_id"] for row in read_rows(tmp_path / "judged")] == [row for row in expected if row != 3]
    assert "| unreadable, left out | 1 |" in (tmp_path / "judged" / "report.md").read_text(encoding="utf-8")


@pytest.mark.bad_input
def test_what_cannot_go_on_is_named(judge, tmp_path, capsys):
    def fails_with(message, **options):
        assert judge(**{"dataset_name": dataset, **options}) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error, error

    columns, _ = make_columns(30)
    dataset = write_parquet(tmp_path / "data", columns)
    other = write_parquet(tmp_path / "other", make_columns(30, seed=1)[0])
    folder = tmp_path / "judged"
    assert judge(dataset_name=dataset) == 0
    before = sorted(path.stat().st_mtime_ns for path in folder.glob("*.parquet"))
    fails_with(f"--keep is 'all', but {folder} was begun with 'agree'. Give another --output_dir", keep="all")
    fails_with(f"--relabel is True, but {folder} was begun with False", relabel=True)
    fails_with("--scorers is {'mine.red': 'mine.py:red@", scorers=["red"])
    fails_with(f"--dataset_name {other} holds other pairs than {folder} was begun with", dataset_name=other)
    (tmp_path / "mine.py").write_text(SCORERS + "\n")
    fails_with("--scorers is {'mine.red': 'mine.py:red@")
    assert before == sorted(path.stat().st_mtime_ns for path in folder.glob("*.parquet"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    fails_with("full is not empty: it holds mine.txt", output_dir=tmp_path / "full")
    with locked_folder(tmp_path / "locked"):
        fails_with("locked is being written by another run", output_dir=tmp_path / "locked")


@pytest.mark.bad_input
def test_pairs_that_cannot_be_judged_are_named(judge, tmp_path, capsys):
    def fails_with(message, **options):
        assert judge(**{"dataset_name": dataset, "output_dir": tmp_path / "new", **options}) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error, error

    columns, _ = make_columns(30)
    dataset = write_parquet(tmp_path / "data", columns)
    fails_with("--dataset_name nowhere", dataset_name="nowhere")
    fails_with("its splits (--dataset_split_name) are train", dataset_split_name="test")
    fails_with("has no column 'winner' (--label_column)", label_column="winner")
    fails_with("--pairs is for drawn pictures", pairs="adjacent")
    fails_with("--min_margin is for drawn pictures", min_margin=1)
    fails_with("--keep and --relabel are for pairs that exist", dataset_name=None, input_dir=tmp_path, keep="majority")
    columns["label_0"][4] = 2.0
    fails_with("Row 4: the label is 2.0", dataset_name=write_parquet(tmp_path / "labels", columns))
    columns["label_0"] = [0.5] * 29 + [1.0]
    columns["jpg_0"] = columns["jpg_1"]
    dataset = write_parquet(tmp_path / "same", columns)
    fails_with("No pair is kept by --keep agree. pairs: 1, unreadable, left out: 0,")
    with pytest.raises(SystemExit):
        judge(dataset_name=dataset, train_data_dir=tmp_path)
    assert "not allowed with argument --dataset_name" in capsys.readouterr().err
