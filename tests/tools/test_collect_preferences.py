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


import contextlib
import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import collect_preferences
import datasets
import encode_preferences
import eval_win_rate
import filelock
import judging
import numpy as np
import pictures
import prepare_preferences
import pyarrow.parquet as pq
import pytest
import rating as rating_module
import safetensors.torch
from common import exit_code
from conftest import ROOT, reset_accelerate
from PIL import Image
from tiny_checkpoints import picture


try:
    from selenium import webdriver
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    webdriver = None

HAS_GRADIO = importlib.util.find_spec("gradio") is not None
needs_gradio = pytest.mark.skipif(not HAS_GRADIO, reason="needs gradio")
needs_browser = pytest.mark.skipif(
    not (HAS_GRADIO and webdriver and shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs gradio, selenium and the Debian packages chromium and chromium-driver",
)
PROMPTS = ["a cat", "a dog at sea"]


@pytest.fixture
def collect(checkpoints, clip, tmp_path, monkeypatch):
    """Runs a command with the tiny models, in this process; options that are `None` are left out."""
    # A page that should not open would wait for its end.
    monkeypatch.setattr(collect_preferences, "serve", None)
    scorers = ("pickscore_model", "pickscore_processor", "clipscore_model")
    defaults = {
        "draw": {
            "pretrained_model_name_or_path": [checkpoints["sd15"]],
            "prompts": PROMPTS,
            "num_images": 3,
            "num_inference_steps": [2],
            "resolution": 32,
            "output_dir": tmp_path / "drawn",
        },
        "judge": {
            "input_dir": tmp_path / "drawn",
            **{f"{name}_name_or_path": clip for name in scorers},
            "output_dir": tmp_path / "pairs",
        },
        "rate": {"input_dir": tmp_path / "drawn", "output_dir": tmp_path / "pairs"},
    }

    def run(command, **options):
        reset_accelerate()
        words = [command]
        for name, value in {**defaults[command], **options}.items():
            values = value if isinstance(value, list) else [value]
            words += [] if value is None else [f"--{name}", *map(str, values)]
        return exit_code(collect_preferences.main, collect_preferences.parse_args(words))

    return run


def save_pictures(folder, prompts=PROMPTS, number=3, **columns):
    """A folder of pictures as `draw` leaves it, but not drawn by a model."""
    folder.mkdir()
    rows = []
    for index, prompt in enumerate(prompts):
        for k in range(number):
            rows.append({"file_name": f"{index:05}-{k:02}.png", "prompt": prompt, **columns})
            picture(10 * index + k).save(folder / rows[-1]["file_name"])
    save_record(folder, rows)
    return folder


def save_record(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_record(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def read_pairs(folder):
    (file,) = folder.glob("*.parquet")
    return pq.read_table(file).to_pylist()


def check(folder):
    return prepare_preferences.main(
        prepare_preferences.parse_args(["check", "--dataset_name", str(folder), "--resolution", "32"])
    )


def test_from_prompts_to_a_win_rate(collect, run_sd15, checkpoints, clip, tmp_path, capsys):
    assert collect("draw", guidance_scale=[1.5, 3, 7.5]) == 0
    drawn = read_record(tmp_path / "drawn")
    assert [row["prompt"] for row in drawn] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert sorted(path.name for path in tmp_path.glob("drawn/**/*.png")) == [row["file_name"] for row in drawn]
    assert len({row["seed"] for row in drawn}) == 6 and len({row["guidance_scale"] for row in drawn}) > 1
    assert len({(tmp_path / "drawn" / row["file_name"]).read_bytes() for row in drawn}) == 6

    assert collect("judge") == 0
    pairs = read_pairs(tmp_path / "pairs")
    assert len(pairs) == 6
    by_name = {row["file_name"]: row for row in drawn}
    for pair in pairs:
        assert (pair["label_0"] == 1) == (pair["probability_0"] > 0.5) == (pair["pickscore_0"] > pair["pickscore_1"])
        for side in (0, 1):
            row = by_name[pair[f"file_name_{side}"]]
            assert pair[f"jpg_{side}"]["bytes"] == (tmp_path / "drawn" / row["file_name"]).read_bytes()
            assert row["prompt"] == pair["caption"] and row["seed"] == pair[f"seed_{side}"]
            assert pair[f"model_{side}"] == checkpoints["sd15"] and pair[f"lora_weights_{side}"] is None
        assert str(clip) in pair["scorers"]
    assert "6 have both and are kept" in (tmp_path / "pairs" / "report.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert check(tmp_path / "pairs") == 0
    report = capsys.readouterr().out
    assert "Fit for training." in report and "Warning" not in report

    reset_accelerate()
    words = {
        "pretrained_model_name_or_path": checkpoints["sd15"],
        "dataset_name": tmp_path / "pairs",
        "resolution": 32,
        "output_dir": tmp_path / "encoded",
    }
    words = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    encode_preferences.main(encode_preferences.parse_args(words))
    run_sd15(dataset_name=None, encoded_data_dir=tmp_path / "encoded", loss_space="latent")
    assert all(weight.abs().max() > 0 for weight in run_sd15.up_weights().values())

    # The next round's pictures by the model against its LoRA, and who wins.
    lora = ["none", str(run_sd15.output_dir)]
    assert collect("draw", lora_weights=lora, num_images=2, output_dir=tmp_path / "round-2") == 0
    rows = read_record(tmp_path / "round-2")
    assert [row["lora_weights"] for row in rows] == [None, str(run_sd15.output_dir)] * 2
    assert all((row["lora_digest"] is None) == (row["lora_weights"] is None) for row in rows)
    reset_accelerate()
    words = ["--pretrained_model_name_or_path", checkpoints["sd15"], "--lora_weights", lora[1], "--prompts", *PROMPTS]
    words += ["--num_inference_steps", "2", "--resolution", "32", "--scorers", "clipscore"]
    words += ["--clipscore_model_name_or_path", str(clip), "--output_dir", str(tmp_path / "win-rate")]
    eval_win_rate.main(eval_win_rate.parse_args(words))
    assert len(list(csv.DictReader(open(tmp_path / "win-rate" / "scores.csv")))) == 2


def test_pictures_are_drawn_once_and_more_may_follow(collect, tmp_path):
    options = {"num_inference_steps": [1, 2], "guidance_scale": [1, 5]}
    assert collect("draw", **options, num_images=2) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("drawn/*.png")}
    assert collect("draw", **options, prompts=[*PROMPTS, "a bird"], num_images=3) == 0
    # Fewer change nothing.
    assert collect("draw", **options, num_images=2) == 0
    assert len(read_record(tmp_path / "drawn")) == 9
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("drawn/*.png")}.items()
    assert collect("draw", **options, prompts=[*PROMPTS, "a bird"], num_images=3, output_dir=tmp_path / "anew") == 0
    assert read_record(tmp_path / "drawn") == read_record(tmp_path / "anew")
    for path in tmp_path.glob("anew/*.png"):
        grown = np.asarray(Image.open(tmp_path / "drawn" / path.name)).astype(int)
        assert abs(grown - np.asarray(Image.open(path))).max() <= 1
    assert len(read_record(tmp_path / "anew")) == 9


def scored(*scores, prompt="a cat"):
    return {prompt: [{"file_name": str(k), "prompt": prompt, "scores": list(row)} for k, row in enumerate(scores)]}


def choose_pairs(prompts, *words, scorers=("pickscore", "clipscore")):
    words = ["judge", "--input_dir", "x", "--output_dir", "x", "--scorers", *scorers, *words]
    args = collect_preferences.parse_args(words)
    pairs, report = judging.choose_pairs(args, scorers, prompts, "versions")
    return {first["file_name"] + second["file_name"]: row for first, second, row in pairs}, report


def test_pairs_are_those_on_which_scorers_agree():
    # The second scorer turns round 0 and 1, and knows no difference of 2 and 3.
    prompts = scored((1.0, 5.0), (2.0, 4.0), (3.0, 9.0), (7.0, 9.0))
    pairs, report = choose_pairs(prompts)
    assert set(pairs) == {"02", "03", "12", "13"}
    assert all(row["label_0"] == 0.0 for row in pairs.values())
    probability = (1 / (1 + math.exp(2)) + 1 / (1 + math.exp(4))) / 2
    assert pairs["02"]["probability_0"] == pytest.approx(probability)
    assert (pairs["02"]["pickscore_0"], pairs["02"]["clipscore_1"]) == (1.0, 9.0)
    assert "6 pairs (all)" in report and "agree on 4;" in report
    # Of six signs four are the same.
    assert "| pickscore | 100% | 67% |" in report
    rows = re.findall(r"\| [\d.]+ - [\d.]+ \| (\d+) \| (\d+) \|", report)
    assert [sum(map(int, column)) for column in zip(*rows)] == [12, 8]

    assert set(choose_pairs(prompts, "--min_margin", "5")[0]) == {"13"}
    assert set(choose_pairs(prompts, "--min_margin", "5", "4")[0]) == {"03", "13"}
    assert set(choose_pairs(prompts, "--min_margin_quantile", "0.5")[0]) == {"03", "13"}
    assert set(choose_pairs(prompts, "--pairs", "best_worst")[0]) == {"03"}
    assert set(choose_pairs(prompts, "--pairs", "adjacent")[0]) == {"12"}
    with pytest.raises(ValueError, match=" 6 pairs .all.; .* 4; 0 .*--min_margin"):
        choose_pairs(prompts, "--min_margin", "100")
    # HPSv2 is a cosine, which its own temperature makes a logit.
    pairs, _ = choose_pairs(scored((0.28,), (0.26,)), scorers=["hpsv2"])
    assert pairs["01"]["label_0"] == 1 and pairs["01"]["probability_0"] == pytest.approx(1 / (1 + math.exp(-2)))


def test_sources_that_always_lose_are_warned_of(collect, tmp_path, capsys, caplog):
    folder = save_pictures(tmp_path / "drawn", model="generator")
    rows = read_record(folder)
    # One real picture of each prompt, which no model is named for, and which wins.
    for row in rows[::3]:
        del row["model"]
    save_record(folder, rows)
    loaded = collect_preferences.read_pictures(folder)
    wins = [(group[0], other) for group in loaded.values() for other in group[1:]]
    alike = [tuple(group[1:]) for group in loaded.values()]

    def write(name, pairs, labels):
        pairs = [(*pair, {"label_0": label}) for pair, label in zip(pairs, labels)]
        collect_preferences.write_pairs(tmp_path / name, pairs, {})
        capsys.readouterr()
        assert check(tmp_path / name) == 0
        return capsys.readouterr().out

    warning = "in 4 of 4 pairs the winner is from no model and the other image is not"
    assert warning in write("real", wins, [1.0] * 4)
    assert warning in caplog.text
    caplog.clear()
    for name, pairs, labels in [
        ("mixed", [*wins, *alike], [1.0] * 6),
        ("both", wins, [1.0, 0.0, 1.0, 0.0]),
        ("ties", alike, [1.0, 0.5]),
    ]:
        assert "Warning" not in write(name, pairs, labels)
    assert not caplog.text
    # In a folder of images, whatever else its rows hold.
    names = ("jpg_0_file_name", "jpg_1_file_name")
    pairs = [(row["file_name"], rows[index + 1]["file_name"]) for index, row in enumerate(rows) if index % 3 == 0]
    rows = [dict(zip(names, pair), label_0=1, caption="", model_0=None, model_1="g", x=[0, "a"]) for pair in pairs]
    save_record(folder, [{**rows[0], "x": 1}, *rows[1:]])
    words = ["check", "--train_data_dir", str(folder)]
    assert prepare_preferences.main(prepare_preferences.parse_args(words)) == 0
    assert "in 2 of 2 pairs the winner is from no model" in capsys.readouterr().out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": None}, "--prompts, --prompts_file and --dataset_name, not 0"),
        ({"prompts": None, "prompts_file": "nowhere.txt"}, "--prompts_file nowhere.txt "),
        (
            {"pretrained_model_name_or_path": ["a", "b"], "lora_weights": ["none"] * 3},
            "--lora_weights has 3 values for 2 of",
        ),
        ({"pretrained_model_name_or_path": ["nowhere"]}, "--pretrained_model_name_or_path nowhere "),
        ({"lora_weights": ["nowhere"]}, "--lora_weights nowhere "),
    ],
)
def test_what_cannot_be_drawn_is_named(collect, options, message, tmp_path, capsys):
    assert collect("draw", **options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("drawn/*"))


@pytest.mark.bad_input
def test_every_model_has_its_turn(collect, checkpoints, capsys):
    assert collect("draw", pretrained_model_name_or_path=list(checkpoints.values()), num_images=2) == 2
    assert "--num_images 2 is too few: 3 models" in capsys.readouterr().err


@pytest.mark.bad_input
def test_pictures_of_another_drawing_are_not_mixed(collect, tmp_path, capsys):
    assert collect("draw", num_images=2) == 0
    for options, message in [
        ({"prompts": ["a fish", "a bird"]}, "The prompts are not those"),
        ({"seed": 1}, "--seed is 1, but was 0"),
        ({"guidance_scale": [1, 2]}, "--guidance_scale is [1.0, 2.0], but was [7.5]"),
    ]:
        assert collect("draw", **options, num_images=2) == 2
        assert message in capsys.readouterr().err


@pytest.mark.bad_input
def test_what_cannot_be_judged_is_named(collect, tmp_path, capsys, caplog):
    def fails_with(message, **options):
        assert collect("judge", **options) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    fails_with("drawn has no metadata.jsonl")
    folder = save_pictures(tmp_path / "drawn")
    fails_with("--min_margin has 3 values for 2 --scorers", min_margin=[1, 2, 3])
    fails_with("6 pairs (all)", min_margin=1000)
    fails_with("--scorers aesthetic cannot be loaded: it needs --aesthetic_weights", scorers="aesthetic")
    rows = read_record(folder)
    save_record(folder, [{**rows[0], "prompt": None}, *rows[1:]])
    fails_with("metadata.jsonl, picture 0: prompt is None, but must be a text")
    save_record(folder, rows)
    (folder / rows[1]["file_name"]).write_bytes(b"\x89PNG")
    fails_with("00000-01.png cannot be read")
    for row in rows[1::3] + rows[2::3]:
        (folder / row["file_name"]).unlink()
    fails_with("drawn has no two pictures")
    assert "4 pictures" in caplog.text and "00000-01.png" in caplog.text
    assert "2 prompts" in caplog.text and "'a cat'" in caplog.text
    assert [path.name for path in tmp_path.glob("pairs/*")] == [".lock"]
    (tmp_path / "pairs" / "mine.txt").touch()
    fails_with("pairs is not empty: it holds mine.txt")


@contextlib.contextmanager
def full_disk(num_bytes):
    """As if no file could grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.bad_input
def test_a_full_disk_while_drawing_is_named(tmp_path):
    with (
        full_disk(100),
        pytest.raises(OSError, match="a.png cannot be written: "),
    ):
        pictures.save_picture(picture(0), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.bad_input
def test_a_full_disk_while_judging_is_named(collect, tmp_path, capsys):
    save_pictures(tmp_path / "drawn")
    with full_disk(1000):
        assert collect("judge") == 2
    assert f"--output_dir {tmp_path / 'pairs'} cannot be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == [".lock"]
    # With room again, the same command does it.
    assert collect("judge") == 0
    assert list((tmp_path / "pairs").glob("*.parquet"))


class Rating:
    """A page without a browser: what it would show to raters who press these keys."""

    def __init__(self, folder, path):
        self.choices = collect_preferences.Choices(
            path, collect_preferences.number_pairs(collect_preferences.read_pictures(folder))
        )
        self.served = path.parent / "served"
        self.served.mkdir(exist_ok=True)
        self.page = collect_preferences.Page(self.choices, self.served)

    def __call__(self, rater, *actions, tab=None):
        state = self.page.act({"rater": rater, "tab": tab or rater, "action": "start", "pair": None})
        for action in actions:
            state = self.page.act({"rater": rater, "tab": tab or rater, "action": action, "pair": state["pair"]})
        return state


@pytest.fixture
def rating(tmp_path):
    return Rating(save_pictures(tmp_path / "drawn"), tmp_path / "choices.jsonl")


def lines(rating):
    return [json.loads(line) for line in rating.choices.path.read_text().splitlines()]


def test_choices_are_those_of_the_pictures_shown(rating, tmp_path):
    sides = set()
    state = rating("ann")
    assert (state["done"], state["total"]) == (0, 6)
    for action in ("left", "right", "left", "right", "left", "right"):
        shown = [open(url.partition("=")[2], "rb").read() for url in state["pictures"]]
        assert not any("0000" in url.rpartition("/")[2][:6] for url in state["pictures"])
        ahead = state["ahead"]
        state = rating.page.act({"rater": "ann", "tab": "ann", "action": action, "pair": state["pair"]})
        assert state["pictures"] == ahead, "loaded before"
        line = lines(rating)[-1]
        sides.add(line["left"])
        won = (tmp_path / "drawn" / line[line["choice"]]).read_bytes()
        assert won == shown[action == "right"] != shown[action == "left"]
    assert sides == {"picture_0", "picture_1"}
    assert state["pair"] is None and state["done"] == 6
    # All prompts come before the second pair of one.
    assert [line["prompt"] for line in lines(rating)[:2]] == PROMPTS


def test_old_pages_and_double_presses_choose_nothing(rating):
    first = rating("ann")["pair"]
    press = {"rater": "ann", "tab": "ann", "action": "left", "pair": first}
    second = rating.page.act(press)
    assert rating.page.act(press)["pair"] == second["pair"] != first
    assert len(lines(rating)) == 1
    assert rating("ann", "undo")["pair"] == first
    assert rating("ann", "undo", "undo")["pair"] == first and len(lines(rating)) == 2


def test_choices_survive_a_crash(rating, tmp_path, caplog):
    before = rating("ann", "left", "tie", "skip", "undo", "right")
    rating("bob", "left")
    with open(rating.choices.path, "ab") as file:
        file.write(b'{"rater": "ann", "pai')
    again = Rating(tmp_path / "drawn", rating.choices.path)
    assert "ends in half a line" in caplog.text
    state = again("ann")
    assert (state["pair"], state["done"]) == (before["pair"], 3)
    # On the same sides as well.
    contents = [[open(url.partition("=")[2], "rb").read() for url in page["pictures"]] for page in (before, state)]
    assert contents[0] == contents[1]
    assert again("bob")["done"] == 1
    assert again("ann", "left")["done"] == 4 and len(lines(again)) == 7


@pytest.mark.bad_input
def test_two_raters_of_one_name(rating, monkeypatch):
    rating("ann", "left")
    assert (
        "ann is rating in another window"
        in rating.page.act({"rater": " ann ", "tab": "other", "action": "start", "pair": None})["error"]
    )
    assert rating.page.act({"rater": " ", "tab": "other", "action": "start", "pair": None}) == {
        "error": "Please give your name."
    }
    assert rating("ann", "left")["done"] == 2, "the first goes on"
    monkeypatch.setattr(rating_module, "LEASE", 0)
    assert rating("ann", tab="other")["done"] == 2, "when the first is gone"


@pytest.mark.bad_input
def test_a_full_disk_while_rating_is_said(rating):
    state = rating("ann", "left")
    size = rating.choices.path.stat().st_size
    press = {"rater": "ann", "tab": "ann", "action": "left", "pair": state["pair"]}
    with full_disk(size + 20):
        assert rating.page.act(press)["error"].startswith("Not saved: ")
    assert rating.choices.path.stat().st_size == size and rating("ann")["pair"] == state["pair"]
    assert rating.page.act(press)["done"] == 2


@pytest.mark.bad_input
def test_choices_of_other_pictures_are_refused(rating, tmp_path):
    rating("ann", "left")
    path = rating.choices.path
    other = save_pictures(tmp_path / "other", prompts=["a fish", "a bird"])
    with pytest.raises(ValueError, match="choices.jsonl, line 1: .*--input_dir"):
        Rating(other, path)
    for line, message in [(b"{", "line 2: "), (b'{"pair": 1}', "line 2: "), (b"[]", "line 2: ")]:
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n" + line + b"\n")
        with pytest.raises(ValueError, match=f"choices.jsonl, {message}"):
            Rating(tmp_path / "drawn", path)


def test_what_raters_chose_becomes_pairs(rating, tmp_path, capsys):
    """Two of three agree on the first pair; one of two has a tie on the second; the third is skipped or split."""
    pairs = list(rating.choices.pairs)

    def choose(rater, *choices):
        for pair, choice in zip(pairs, choices):
            rating.choices.add(rater=rater, pair=pair, choice=choice, seconds=1.0)

    choose("ann", "picture_0", "tie", "skip", "picture_1")
    choose("bob", "picture_1", "picture_1", "picture_0", "picture_0")
    choose("cleo", "picture_0")
    folder = tmp_path / "pairs"
    folder.mkdir()
    collect_preferences.write_choices(folder, rating.choices)
    # More may follow.
    choose("dan", "picture_0")
    collect_preferences.write_choices(folder, rating.choices)
    rows = {(row["file_name_0"], row["file_name_1"]): row for row in read_pairs(folder)}
    found = [rows.pop(tuple(picture["file_name"] for picture in rating.choices.pairs[pair])) for pair in pairs[:4]]
    assert not rows
    assert [row["label_0"] for row in found] == [1.0, 0.0, 1.0, 0.5]
    assert [row["probability_0"] for row in found] == [0.75, 0.25, 1.0, 0.5]
    assert [row["raters"] for row in found] == ["ann, bob, cleo, dan", "ann, bob", "bob", "ann, bob"]
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "3 pairs with a winner and 1 ties" in report
    assert "| ann | 2 | 1 | 1 |" in report
    # Of 0, tie and 1 against 1, 1 and 0 none is equal; by chance 1/3 * 1/3 + 1/3 * 2/3 would be.
    assert "| ann, bob | 3 | 0% | -0.50 |" in report
    capsys.readouterr()
    assert check(folder) == 0
    assert "Fit for training." in capsys.readouterr().out
    dataset = datasets.load_dataset(str(folder), split="train", cache_dir=tmp_path / "cache")
    assert len(dataset) == 4 and dataset[0]["jpg_0"].size == (40, 48)


class Served:
    """`rate` as a process of its own, and a browser at its page."""

    def __init__(self, folder, output_dir, port):
        self.words = ["rate", "--input_dir", folder, "--output_dir", output_dir]
        self.port = port
        options = webdriver.ChromeOptions()
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def start(self, *flags):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tools" / "collect_preferences.py", *self.words, *flags],
            env={**os.environ, "GRADIO_SERVER_PORT": str(self.port), "RATE_PASSWORD": "secret"},
            stdout=subprocess.PIPE,
            text=True,
        )
        line = next((line for line in self.process.stdout if "Rate on" in line), "it did not start")
        self.browser.get(re.search(r"http\S+", line)[0])

    def stop(self, sign):
        self.process.send_signal(sign)
        output = self.process.communicate(timeout=60)[0]
        return self.process.returncode, output

    def close(self):
        self.browser.quit()
        self.process.kill()
        self.process.communicate()

    def wait(self, condition):
        return WebDriverWait(self.browser, 60, 0.05, [StaleElementReferenceException]).until(lambda _: condition())

    def find(self, selector):
        return self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, selector))[0]

    def says(self, selector, text):
        self.wait(lambda: text in self.find(selector).text)

    def enter(self, name):
        field = self.find("input[name=rater]")
        field.clear()
        field.send_keys(name, Keys.ENTER)

    def press(self, *keys):
        for key in keys:
            self.find("body").send_keys(key)

    def shown(self):
        """The files of the pictures on the page, left and right, which can be seen, and how often each was loaded."""
        images = self.browser.find_elements(By.CSS_SELECTOR, ".pictures img")
        assert all(image.is_displayed() and image.get_property("naturalWidth") == 40 for image in images)
        urls = [image.get_property("src") for image in images]
        script = "return arguments[0].map(url => performance.getEntriesByName(url).length)"
        assert self.browser.execute_script(script, urls) == [1] * len(urls), "loaded once, ahead"
        return [Path(url.partition("file=")[2]).read_bytes() for url in urls]


@pytest.fixture
def served(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = Served(save_pictures(tmp_path / "drawn", model="m"), tmp_path / "pairs", port)
    yield served
    served.close()


@needs_browser
def test_people_rate_in_a_browser(served, tmp_path, capsys):
    def choices():
        return [json.loads(line) for line in (tmp_path / "pairs" / "choices.jsonl").read_text().splitlines()]

    # Choose, by keys and by hand.
    served.start()
    served.enter("ann")
    served.says(".status", "ann: 0 of 6")
    assert served.find(".task").text == "Click the better picture of"
    assert served.find("progress").get_property("position") == 0
    left, right = served.shown()
    served.press(Keys.ARROW_RIGHT)
    served.says(".status", "ann: 1 of 6, about 1 min left")
    (first,) = choices()
    assert (tmp_path / "drawn" / first[first["choice"]]).read_bytes() == right
    assert first["prompt"] == PROMPTS[0] and served.find("h2").text == PROMPTS[1]
    left, right = served.shown()
    served.browser.find_elements(By.CSS_SELECTOR, ".pictures button")[0].click()
    served.says(".status", "ann: 2 of 6")
    second = choices()[-1]
    assert (tmp_path / "drawn" / second[second["choice"]]).read_bytes() == left
    served.press(" ")
    served.says(".status", "ann: 3 of 6")
    served.press("s")
    served.says(".status", "ann: 4 of 6")
    assert [line["choice"] for line in choices()[2:]] == ["tie", "skip"]
    served.browser.save_screenshot(str(tmp_path / "desktop.png"))

    # Undo.
    after_skip = served.shown()
    served.press("U")
    served.says(".status", "ann: 3 of 6")
    before_skip = served.shown()
    assert before_skip != after_skip and choices()[-1]["choice"] == "undo"

    # Reload.
    served.browser.refresh()
    served.says(".status", "ann: 3 of 6")
    assert served.shown() == before_skip
    served.press(Keys.ARROW_LEFT)
    served.says(".status", "ann: 4 of 6")
    assert served.shown() == after_skip

    # Two raters, not of one name.
    window = served.browser.current_window_handle
    address = served.browser.current_url
    served.browser.switch_to.new_window("tab")
    served.browser.get(address)
    served.enter("ann")
    served.says(".message", "ann is rating in another window")
    served.enter("bob")
    served.says(".status", "bob: 0 of 6")
    served.press(Keys.ARROW_RIGHT)
    served.says(".status", "bob: 1 of 6")
    served.browser.close()
    served.browser.switch_to.window(window)

    # Crash: nothing is lost, and the page says that nothing is saved. Then again, for others by a password.
    served.stop(signal.SIGKILL)
    served.press(Keys.ARROW_LEFT)
    served.says(".message", "Not saved: no answer from the server")
    served.start("--host", "127.0.0.1", "--username", "us")
    served.find("input[type=password]")
    name, password = served.browser.find_elements(By.CSS_SELECTOR, "input")
    name.send_keys("us")
    password.send_keys("secret", Keys.ENTER)
    served.says(".status", "ann: 4 of 6")
    assert served.shown() == after_skip

    # On a phone.
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    served.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for element in [*served.browser.find_elements(By.CSS_SELECTOR, ".pictures img"), served.find("[data-action=tie]")]:
        box = element.rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    served.browser.save_screenshot(str(tmp_path / "phone.png"))
    for done in ("5 of 6", "6 of 6"):
        served.browser.find_elements(By.CSS_SELECTOR, ".pictures button")[1].click()
        served.says(".status", done)
    assert served.find("h2").text == "All pairs are rated. Thank you!" and not served.find(".task").is_displayed()
    assert "left" not in served.find(".status").text

    # No other server was asked for anything.
    events = (json.loads(entry["message"])["message"] for entry in served.browser.get_log("performance"))
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert asked and all(url.startswith(("http://127.0.0.1:", "data:", "blob:", "chrome:")) for url in asked)

    code, output = served.stop(signal.SIGTERM)
    assert code == 0 and "| ann, bob | 1 | " in output
    assert len(read_pairs(tmp_path / "pairs")) == 6
    assert check(tmp_path / "pairs") == 0
    assert "Fit for training." in capsys.readouterr().out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, message",
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 lets others in"),
        ({"host": "0.0.0.0", "username": "us"}, "RATE_PASSWORD"),
        ({"username": "us"}, "--username needs --host"),
        ({}, "has no metadata.jsonl"),
    ],
)
@needs_gradio
def test_what_cannot_be_rated_is_named(collect, options, message, capsys, monkeypatch):
    monkeypatch.delenv("RATE_PASSWORD", raising=False)
    assert collect("rate", **options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.bad_input
@pytest.mark.parametrize("command", ["draw", "judge", pytest.param("rate", marks=needs_gradio)])
def test_one_run_at_a_time(collect, command, tmp_path, capsys):
    if command != "draw":
        save_pictures(tmp_path / "drawn")
    output = tmp_path / ("drawn" if command == "draw" else "pairs")
    output.mkdir(exist_ok=True)
    with filelock.FileLock(output / ".lock"):
        # It is refused before anything is loaded.
        assert collect(command, **({} if command == "draw" else {"input_dir": "nowhere"})) == 2
    assert f"--output_dir {output} is being written" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_the_password_comes_from_the_environment_or_is_asked_for(monkeypatch):
    words = ["rate", "--input_dir", "x", "--output_dir", "x", "--host", "0.0.0.0", "--username", "us"]
    args = collect_preferences.parse_args(words)
    monkeypatch.setenv("RATE_PASSWORD", "secret")
    assert collect_preferences.read_login(args) == ("us", "secret")
    monkeypatch.delenv("RATE_PASSWORD")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(collect_preferences.getpass, "getpass", lambda prompt: f"typed after {prompt}")
    assert collect_preferences.read_login(args) == ("us", "typed after Password for us: ")


@pytest.mark.bad_input
@needs_gradio
def test_pairs_of_another_tool_are_not_touched(collect, tmp_path, capsys):
    save_pictures(tmp_path / "drawn")
    assert collect("judge") == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("pairs/*")}
    assert collect("rate") == 2
    assert "train-00000-of-00001.parquet" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.glob("pairs/*")}
    # `convert` copies the columns that rate wrote, but not its choices.
    (file,) = tmp_path.glob("pairs/*.parquet")
    rated = pq.read_table(file)
    pq.write_table(rated.append_column("raters", rated["caption"]), file)
    with pytest.raises(ValueError, match=file.name):
        collect_preferences.check_rated_folder(file.parent)
    # So does `filter`, and its file may be beside the choices.
    (file.parent / "choices.jsonl").touch()
    collect_preferences.check_rated_folder(file.parent)
    kept = file.with_name("kept.parquet")
    kept.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="kept.parquet"):
        collect_preferences.check_rated_folder(file.parent)
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(ValueError, match="report.md, which rate did not write"):
        collect_preferences.check_rated_folder(tmp_path)


def test_a_result_without_pairs_removes_nothing(rating, tmp_path, caplog):
    pair = next(iter(rating.choices.pairs))
    folder = tmp_path / "pairs"
    folder.mkdir()
    rating.choices.add(rater="ann", pair=pair, choice="picture_0", seconds=1.0)
    collect_preferences.write_choices(folder, rating.choices)
    (file,) = folder.glob("*.parquet")
    before, report = file.read_bytes(), (folder / "report.md").read_text()
    rating.choices.add(rater="ann", pair=pair, choice="undo")
    collect_preferences.write_choices(folder, rating.choices)
    assert file.read_bytes() == before and str(folder) in caplog.text
    assert (folder / "report.md").read_text() == report
    # A file that cannot be written leaves the earlier one as it was, too.
    rating.choices.add(rater="ann", pair=pair, choice="picture_1", seconds=1.0)
    with full_disk(100), pytest.raises(OSError, match="--output_dir .*pairs"):
        collect_preferences.write_choices(folder, rating.choices)
    assert file.read_bytes() == before
    collect_preferences.write_choices(folder, rating.choices)
    assert [row["label_0"] for row in read_pairs(folder)] == [0.0]


def test_pictures_removed_while_people_rate(rating, tmp_path, caplog):
    """Votes on removed pictures stay in the file, make no pairs, and stop neither the page nor a restart."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    state = rating("ann", "left", "left", "left", "left")
    assert state["done"] == 4
    collect_preferences.write_choices(folder, rating.choices)
    assert len(read_pairs(folder)) == 4
    seen, unseen = (rating.choices.pairs[list(rating.choices.pairs)[number]][0]["path"] for number in (0, 5))
    seen.unlink()
    collect_preferences.write_choices(folder, rating.choices)
    rows = read_pairs(folder)
    assert 0 < len(rows) < 4
    assert not any(seen.name in (row["file_name_0"], row["file_name_1"]) for row in rows)
    assert "a picture was removed" in caplog.text and len(lines(rating)) == 4

    caplog.clear()
    unseen.unlink()
    while (state := rating("ann"))["pair"] is not None:
        assert "error" not in state
        assert unseen not in [shown["path"] for shown in rating.choices.pairs[state["pair"]]]
        rating("ann", "right")
    assert "error" not in rating("bob")
    assert unseen.name in caplog.text and len(set(caplog.messages)) == len(caplog.messages)

    caplog.clear()
    again = Rating(tmp_path / "drawn", rating.choices.path)
    assert "choices are left out" in caplog.text
    state = again("bob")
    assert 0 < state["total"] < 6
    for name in state["pictures"]:
        assert Path(name.partition("=")[2]).is_file()


def test_a_restart_after_the_only_rated_picture_was_removed(tmp_path, caplog):
    folder = save_pictures(tmp_path / "drawn", number=2)
    rating = Rating(folder, tmp_path / "choices.jsonl")
    rating("ann", "left")
    (name,) = [line["picture_1"] for line in lines(rating)]
    (folder / name).unlink()
    again = Rating(folder, rating.choices.path)
    assert "1 choices are left out" in caplog.text and name in caplog.text
    assert (again("ann")["done"], again("ann")["total"]) == (0, 1)
    assert len(lines(again)) == 1


@pytest.mark.bad_input
@pytest.mark.parametrize("command", ["judge", pytest.param("rate", marks=needs_gradio)])
@pytest.mark.parametrize("kind", ["relative", "absolute", "link"])
def test_pictures_outside_the_folder_are_refused(collect, command, kind, tmp_path, capsys):
    folder = save_pictures(tmp_path / "drawn")
    private = tmp_path / "private.png"
    picture(99).save(private)
    (folder / "link.png").symlink_to(private)
    name = {"relative": "../private.png", "absolute": str(private), "link": "link.png"}[kind]
    rows = read_record(folder)
    save_record(folder, [*rows, {"file_name": name, "prompt": PROMPTS[0]}])
    assert collect(command) == 2
    assert f"metadata.jsonl, picture 6: {name!r}" in capsys.readouterr().err
    assert not list(tmp_path.glob("pairs/*.parquet"))


@pytest.mark.bad_input
@pytest.mark.parametrize("layer, value", [("post_quant_conv", "nan"), ("decoder.conv_out", "inf")])
def test_pictures_that_are_not_finite_are_not_saved(collect, checkpoints, tmp_path, capsys, layer, value):
    model = tmp_path / "nan"
    shutil.copytree(checkpoints["sd15"], model)
    (file,) = (model / "vae").glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    weights[f"{layer}.bias"][0] = float(value)
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    # Two models take turns in the pictures of a prompt.
    models = [checkpoints["sd15"], str(model)]
    assert collect("draw", pretrained_model_name_or_path=models, num_images=2) == 2
    error = capsys.readouterr().err
    for named in ("00000-01.png", "'a cat'", f"--pretrained_model_name_or_path {model}", "--mixed_precision no"):
        assert named in error
    drawn = sorted(path.name for path in tmp_path.glob("drawn/*.png"))
    assert drawn == ["00000-00.png", "00001-00.png"]


@pytest.mark.bad_input
def test_scores_that_are_not_finite_are_named(collect, clip, tmp_path, capsys):
    save_pictures(tmp_path / "drawn")
    broken = shutil.copytree(clip, tmp_path / "clip")
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["visual_projection.weight"][:] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert collect("judge", clipscore_model_name_or_path=broken) == 2
    assert "00000-00.png: --scorers clipscore returned nan, but a score must be finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("pairs/*.parquet"))


@pytest.mark.bad_input
def test_a_folder_of_other_pictures_is_not_drawn_into(collect, tmp_path, capsys):
    folder = save_pictures(tmp_path / "drawn")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert collect("draw") == 2
    assert f"{folder} has no settings.json" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_prompts_that_say_the_same_are_one(tmp_path, caplog):
    folder = save_pictures(tmp_path / "drawn", prompts=["a cat", "A  cat "], number=2)
    shutil.copy(folder / "00000-00.png", folder / "00001-01.png")
    groups = collect_preferences.read_pictures(folder)
    # The fourth picture equals the first.
    assert [len(rows) for rows in groups.values()] == [3] and list(groups) == ["a cat"]
    assert len(collect_preferences.number_pairs(groups)) == 3
    assert "00001-01.png, which equals 00000-00.png" in caplog.text


@pytest.mark.bad_input
def test_gradio_is_asked_for(collect, monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0")
    assert collect("rate") == 2
    error = capsys.readouterr().err
    assert (
        "gradio 6.31.0 or later is needed, and 5.0 is installed: run `pip install -r tools/requirements.txt`" in error
    )
