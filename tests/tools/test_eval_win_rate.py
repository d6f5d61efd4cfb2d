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


import csv
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import reset_accelerate, run_on_two_processes
from datasets import Dataset
from PIL import Image
from tiny_checkpoints import build_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import eval_win_rate


PROMPTS = ["a cat", "a dog", "a bird, and <b>more</b>"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP with its processor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(tokenizer), **ids},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(checkpoints, clip, tmp_path):
    def command(*flags, output_dir=tmp_path / "evaluation", prompts=PROMPTS, **options):
        options = {
            "pretrained_model_name_or_path": checkpoints["sd15"],
            "pickscore_model_name_or_path": clip,
            "pickscore_processor_name_or_path": clip,
            "clipscore_model_name_or_path": clip,
            "num_inference_steps": 2,
            "resolution": 32,
            "output_dir": output_dir,
            **options,
        }
        return [
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
            "--prompts",
            *prompts,
            *flags,
        ]

    def run(*flags, **options):
        reset_accelerate()
        args = eval_win_rate.parse_args(command(*flags, **options))
        eval_win_rate.main(args)
        return Path(args.output_dir)

    run.command = command
    return run


def picture(folder, side, index):
    return np.asarray(Image.open(folder / side / f"{index:05}.png")).astype(float)


def test_a_lora_against_its_base(evaluate, run_sd15, capsys):
    run_sd15(loss_space="latent", learning_rate=0.1)
    folder = evaluate("--scorers", "pickscore", "clipscore", lora_weights=run_sd15.output_dir)
    rows = list(csv.DictReader(open(folder / "scores.csv")))
    assert [row["prompt"] for row in rows] == PROMPTS
    for index in range(len(PROMPTS)):
        assert np.abs(picture(folder, "model", index) - picture(folder, "baseline", index)).max() > 0
    wins = sum(float(row["pickscore_model"]) > float(row["pickscore_baseline"]) for row in rows)
    assert "| pickscore |" in capsys.readouterr().out
    assert f" {wins / 3:.1%} " in (folder / "summary.md").read_text().splitlines()[2]

    page = (folder / "index.html").read_text()
    assert "&lt;b&gt;more" in page and "<b>more" not in page
    margins = [float(margin) for margin in re.findall(r"<br>([+-][\d.e-]+)</td>", page)]
    assert len(margins) == 3 and margins == sorted(margins, reverse=True)


def test_a_model_against_itself(evaluate):
    folder = evaluate("--scorers", "clipscore")
    for index in range(len(PROMPTS)):
        assert np.array_equal(picture(folder, "model", index), picture(folder, "baseline", index))
    assert "| 50.0% |" in (folder / "summary.md").read_text()


def test_every_prompt_has_noise_of_its_own(evaluate):
    folder = evaluate("--scorers", "clipscore", prompts=["a cat", "a cat"])
    assert not np.array_equal(picture(folder, "model", 0), picture(folder, "model", 1))


def test_sides_may_be_swapped(evaluate, run_sd15, checkpoints, tmp_path):
    run_sd15(loss_space="latent", learning_rate=0.1)
    lora = run_sd15.output_dir
    there = evaluate(output_dir=tmp_path / "there", lora_weights=lora, baseline_model_name_or_path=checkpoints["sd2"])
    back = evaluate(
        output_dir=tmp_path / "back",
        pretrained_model_name_or_path=checkpoints["sd2"],
        baseline_model_name_or_path=checkpoints["sd15"],
        baseline_lora_weights=lora,
    )
    for row, other in zip(*(list(csv.DictReader(open(folder / "scores.csv"))) for folder in (there, back))):
        for scorer in ("pickscore", "clipscore"):
            assert row[f"{scorer}_model"] == other[f"{scorer}_baseline"] != row[f"{scorer}_baseline"]
            assert row[f"{scorer}_baseline"] == other[f"{scorer}_model"]


def test_noise_does_not_depend_on_the_batch(evaluate, tmp_path):
    one, three = (evaluate(output_dir=tmp_path / str(size), batch_size=size) for size in (1, 3))
    for index in range(len(PROMPTS)):
        assert np.abs(picture(one, "model", index) - picture(three, "model", index)).max() <= 1


def test_pictures_are_drawn_once(evaluate, monkeypatch):
    folder = evaluate(prompts=PROMPTS[:2])
    drawn = []
    save = Image.Image.save

    def note(image, path, *args, **kwargs):
        drawn.append(path)
        save(image, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", note)
    (folder / "model" / "00001.png").unlink()
    evaluate()
    # The one that was removed, and both sides of the prompt that is new.
    assert sorted(f"{path.parent.name}/{path.stem}" for path in drawn) == [
        "baseline/00002",
        "model/00001",
        "model/00002",
    ]


def test_broken_pictures_are_errors(evaluate):
    folder = evaluate()
    (folder / "baseline" / "00001.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="baseline/00001.png cannot be read"):
        evaluate()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, message",
    [({"seed": 1}, "--seed is 1, but was 0"), ({"prompts": ["a fish"]}, "the prompts are others")],
)
def test_pictures_of_other_settings_are_not_mixed(evaluate, options, message):
    evaluate()
    with pytest.raises(ValueError, match=message):
        evaluate(**options)


@pytest.mark.bad_input
def test_pictures_of_a_lora_that_trained_on_are_not_kept(evaluate, run_sd15, tmp_path):
    run_sd15(loss_space="latent", max_train_steps=1)
    evaluate(lora_weights=run_sd15.output_dir)
    run_sd15(loss_space="latent", max_train_steps=2)
    with pytest.raises(ValueError, match="--lora_weights holds other weights for the pictures in .*evaluation/model"):
        evaluate(lora_weights=run_sd15.output_dir)
    # The other side stays.
    folder = tmp_path / "evaluation"
    before = (folder / "baseline" / "00000.png").stat().st_mtime_ns
    shutil.rmtree(folder / "model")
    evaluate(lora_weights=run_sd15.output_dir)
    assert (folder / "baseline" / "00000.png").stat().st_mtime_ns == before


@pytest.mark.bad_input
def test_a_mistake_before_the_first_picture_may_be_mended(evaluate, tmp_path):
    with pytest.raises((OSError, ValueError)):
        evaluate(lora_weights=tmp_path / "typo")
    evaluate()


@pytest.mark.bad_input
def test_pictures_of_a_model_that_was_replaced_are_not_kept(evaluate, checkpoints, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoints["sd15"], model)
    evaluate(pretrained_model_name_or_path=model)
    shutil.rmtree(model)
    shutil.copytree(checkpoints["sd2"], model)
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path holds other weights"):
        evaluate(pretrained_model_name_or_path=model)


def test_processes_share_the_prompts(evaluate, tmp_path):
    one = evaluate(output_dir=tmp_path / "one", batch_size=1)
    two = evaluate.command(output_dir=tmp_path / "two", batch_size=1)
    result = run_on_two_processes("tools/eval_win_rate.py", two)
    assert result.returncode == 0, result.stderr
    rows, expected = (list(csv.DictReader(open(folder / "scores.csv"))) for folder in (tmp_path / "two", one))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected):
        assert row["prompt"] == other["prompt"]
        for name in ("pickscore_model", "clipscore_baseline"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)


def test_prompts_from_everywhere(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "prompts.tsv").write_text('Prompt\tCategory\n"a cat" sits\tAnimals\n"a dog\tAnimals\n')
    Dataset.from_dict({"caption": ["a cat", "a dog"]}).to_parquet(str(tmp_path / "prompts.parquet"))
    Dataset.from_dict({"caption": ["a cat", "a dog"]}).to_parquet(str(tmp_path / "folder" / "train.parquet"))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("caption\na cat\na dog\n")

    def prompts(*flags):
        words = ["--pretrained_model_name_or_path", "none", *map(str, flags)]
        return eval_win_rate.load_prompts(eval_win_rate.parse_args(words))

    assert prompts("--prompts", "a cat", "a dog") == ["a cat", "a dog"]
    assert prompts("--prompts_file", tmp_path / "prompts.txt") == ["a cat", "a dog"]
    assert prompts("--prompts_file", tmp_path / "prompts.tsv", "--prompt_column", "Prompt") == [
        '"a cat" sits',
        '"a dog',
    ]
    assert prompts("--prompts_file", tmp_path / "prompts.parquet", "--max_prompts", 1) == ["a cat"]
    for name in ("folder", "table"):
        assert prompts("--dataset_name", tmp_path / name) == ["a cat", "a dog"]
    for flags, message in [
        ([], "Give one of --prompts, --prompts_file and --dataset_name, not 0"),
        (["--prompts", "x", "--dataset_name", "y"], "not 2"),
        (["--prompts", "x", "--max_prompts", 0], "--max_prompts is 0, but must be at least 1"),
        (["--prompts_file", tmp_path / "prompts.json"], "must end in"),
        (["--prompts_file", tmp_path / "prompts.parquet", "--prompt_column", "text"], "there are only caption"),
    ]:
        with pytest.raises(ValueError, match=message):
            prompts(*flags)


def test_comparison():
    result = eval_win_rate.compare([*range(1, 9), 0, 0], [*[0] * 8, 1, 1])
    assert result.win_rate == 0.8
    # Wilson's interval and the sign test as R's binom::binom.wilson and binom.test give them
    assert (result.low, result.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert result.p_value == pytest.approx(0.1094, abs=1e-4)
    assert (result.median, result.baseline_median) == (3.5, 0)
    tied = eval_win_rate.compare([1, 2, 3], [1, 2, 3])
    assert tied.win_rate == 0.5 and tied.p_value == 1


def test_clipscore_is_the_cosine(clip, tmp_path):
    args = eval_win_rate.parse_args(
        ["--pretrained_model_name_or_path", "none", "--clipscore_model_name_or_path", str(clip)]
    )
    scorer = eval_win_rate.load_clipscore(args)
    image = Image.new("RGB", (40, 20), "red")
    image.save(tmp_path / "red.png")
    inputs = scorer.processor(text=["a cat"], images=[image], return_tensors="pt")
    with torch.no_grad():
        text = scorer.model.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output
        picture = scorer.model.get_image_features(inputs.pixel_values).pooler_output
        expected = 100 * torch.nn.functional.cosine_similarity(text, picture).item()
        assert scorer("a cat", tmp_path / "red.png") == pytest.approx(expected, abs=1e-3)


def test_aesthetic_head(evaluate, clip, tmp_path):
    torch.manual_seed(0)
    sizes = {0: (12, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for number, (width, out) in sizes.items():
        state[f"layers.{number}.weight"] = torch.randn(out, width) / width**0.5
        state[f"layers.{number}.bias"] = torch.randn(out)
    torch.save(state, tmp_path / "head.pth")
    folder = evaluate("--scorers", "aesthetic", aesthetic_weights=tmp_path / "head.pth")
    row = next(csv.DictReader(open(folder / "scores.csv")))

    scorer = eval_win_rate.CLIPSimilarity(clip, clip)
    with torch.no_grad():
        _, x = scorer.embed("", Image.open(folder / "model" / "00000.png"))
        for number in sizes:
            x = x @ state[f"layers.{number}.weight"].mT + state[f"layers.{number}.bias"]
    assert float(row["aesthetic_model"]) == pytest.approx(x.item(), rel=1e-4)


PACKAGES = {
    # What is used of them, as their sources have it. Both score by how red a picture is.
    "hpsv2/img_score.py": """
import torch
from torchvision_of_the_test import to_tensor

model_dict = {}

class Model(torch.nn.Linear):
    def forward(self, image, text):
        features = torch.nn.functional.normalize(super().forward(image.mean(dim=(2, 3))))
        return {"image_features": features, "text_features": text}

def initialize_model():
    assert device == "cpu"
    model_dict.update(model=Model(3, 3, bias=False), preprocess_val=to_tensor)
""",
    "hpsv2/src/open_clip/__init__.py": """
import torch

def get_tokenizer(name):
    assert name == "ViT-H-14"
    return lambda prompts: torch.tensor([[1.0, 0, 0]])
""",
    "ImageReward/__init__.py": """
import torch
from PIL import Image
from torchvision_of_the_test import to_tensor

class Model(torch.nn.Module):
    def score(self, prompt, path):
        assert self.device.type == "cpu" and isinstance(path, str)
        return to_tensor(Image.open(path))[0].mean().item()

def load(name, device):
    assert name == "ImageReward-v1.0"
    return Model()
""",
    "torchvision_of_the_test.py": """
import numpy, torch

def to_tensor(image):
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255
""",
}


def test_scorers_of_other_packages(evaluate, tmp_path, monkeypatch):
    for name, text in PACKAGES.items():
        file = tmp_path / "packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    torch.save({"state_dict": {"weight": torch.eye(3)}}, tmp_path / "weights")
    downloaded = []

    def download(*names):
        downloaded.append(names)
        return tmp_path / "weights"

    monkeypatch.setattr(eval_win_rate, "hf_hub_download", download)
    try:
        folder = evaluate("--scorers", "hpsv2", "imagereward")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("hpsv2", "ImageReward")]:
            del sys.modules[name]
    for index, row in enumerate(csv.DictReader(open(folder / "scores.csv"))):
        colour = picture(folder, "model", index).mean(axis=(0, 1))
        assert float(row["imagereward_model"]) == pytest.approx(colour[0] / 255, rel=1e-4)
        assert float(row["hpsv2_model"]) == pytest.approx(colour[0] / np.linalg.norm(colour), rel=1e-4)
    assert downloaded == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")], "once for all pictures"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "scorer, message",
    [
        ("hpsv2", "pip install hpsv2"),
        ("imagereward", "pip install image-reward"),
        ("aesthetic", "needs --aesthetic_weights"),
    ],
)
def test_scorers_that_are_not_there(evaluate, scorer, message, tmp_path):
    with pytest.raises((ImportError, ValueError), match=message):
        evaluate("--scorers", scorer)
    assert not (tmp_path / "evaluation").exists(), "nothing is drawn before"
