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

"""README's steps run as they are written: with the small world's model and pictures, and with fewer of everything."""

import csv
import importlib
import random
import re
from pathlib import Path

import experiment
import torch
from base import ASSETS
from conftest import reset_accelerate
from datasets import Dataset
from safetensors.torch import load_file
from scenes import RESOLUTION, SCENES, render
from test_docs import FENCE, block_commands, section, split_commands, split_script


NUM_PROMPTS, NUM_PICTURES = 10, 3
# What is on the hub, and what takes its place.
REPLACED = {
    "MODEL": str(ASSETS),
    "kashif/pickascore": "pickascore",
    "ncp-simpo-sd15/checkpoint-500": "ncp-simpo-sd15/checkpoint-2",
}
FEWER = {
    "--mixed_precision": "no",
    "--dataloader_num_workers": "0",
    "--rank": "4",
    "--train_batch_size": "2",
    "--max_train_steps": "4",
    "--checkpointing_steps": "2",
    "--validation_steps": "2",
    "--num_eval_pairs": "4",
    "--max_prompts": "3",
}
ADDED = {
    "encode_preferences": {"resolution": RESOLUTION},
    "train_ncp_dpo_sd15": {"resolution": RESOLUTION, "ncp_error_scale": 1000, "num_validation_images": 1},
    "eval_win_rate": {"num_inference_steps": 2},
    "draw": {"num_inference_steps": 2},
}


def write_pairs(monkeypatch):
    """Pictures of some prompts, of which a later one is always better, and prompts to evaluate with."""
    monkeypatch.setattr(experiment, "PICTURES_PER_SCENE", NUM_PICTURES)
    scenes = [scene for scene in SCENES[:NUM_PROMPTS] for _ in range(NUM_PICTURES)]
    images = experiment.to_pil(render(scenes, torch.Generator().manual_seed(0)))
    rewards = torch.arange(float(len(scenes)))
    rows = experiment.compare(scenes, list(map(experiment.encode_png, images)), rewards, random.Random(0))
    prompts = [{"caption": scene.caption} for scene in SCENES[NUM_PROMPTS : 2 * NUM_PROMPTS]]
    Dataset.from_list(rows).to_parquet("pick-a-pic/data/train-00000-of-00001.parquet")
    Dataset.from_list(prompts).to_parquet("pickascore/validation-00000-of-00001.parquet")


def run(words, clip):
    """Runs a command in this process, in the working directory."""
    script, rest = split_script(words)
    if script is None:
        return
    rest = [REPLACED.get(word, word) for word in rest]
    for flag in FEWER.keys() & set(rest):
        rest[rest.index(flag) + 1] = FEWER[flag]
    name = Path(script).stem
    models = {f"{scorer}_model_name_or_path": clip for scorer in ("clipscore", "pickscore")}
    models["pickscore_processor_name_or_path"] = clip
    options = ADDED.get(name, {}) | ADDED.get(rest[0], {})
    if "--scorers" in rest:
        options = options | models
    module = importlib.import_module(name)
    reset_accelerate()
    assert not module.main(module.parse_args([*rest, *experiment.script_words(options)])), words


def test_readme_from_pairs_to_a_lora(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pairs(monkeypatch)
    train = block_commands(section("README.md", "Train"))
    assert len(train) >= 7
    for words in train:
        run(words, clip)
    printed = capsys.readouterr().out
    assert (
        "Fit for training." in printed
        and f"{3 * NUM_PROMPTS} pairs / {NUM_PROMPTS} prompts -> {2 * NUM_PROMPTS}" in printed
    )
    lora = Path("ncp-simpo-sd15")
    steps = {row["step"] for row in csv.DictReader(open(lora / "eval.csv"))}
    assert steps == {"0", "2", "4"}
    for name in ("run.png", "checkpoint-2", "checkpoint-4", "validation/step-4.png", "validation/before_after.png"):
        assert (lora / name).exists()
    assert "| clipscore |" in Path("win-rate/summary.md").read_text(encoding="utf-8")

    use = section("README.md", "Use the LoRA")
    ((_, code),) = FENCE.findall(use)
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(ASSETS)).replace('.to("cuda")', "")
    loaded = {}
    exec(code, loaded)
    assert loaded["pipeline"].get_active_adapters()
    for file in re.findall(r"`(\w+_kohya\.safetensors)`", use):
        assert any("lora_up" in name and weight.any() for name, weight in load_file(lora / file).items())
    (convert,) = split_commands(re.findall(r"`(python [^`]+)`", use))
    run(convert, clip)
    assert list((lora / "checkpoint-2").glob("*_kohya.safetensors"))


def test_readme_from_prompts_to_pairs(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(f"{scene.caption}\n" for scene in SCENES[:2]))
    for words in block_commands(section("README.md", "Your own pairs")):
        run(words, clip)
    assert set(Dataset.from_parquet("judged/*.parquet")["label_0"]) <= {0.0, 1.0}
