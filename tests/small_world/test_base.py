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


import json
import shutil

import base
import pytest
import torch
from experiment import draw, load_pipeline
from scenes import SCENES, Explanations, reward
from transformers import CLIPTokenizer

from diffusers import StableDiffusionPipeline


def train_base(folder, size="small", **options):
    """A base model that has seen three batches."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"NUM_PICTURES": 100, **options}.items():
            monkeypatch.setattr(base, name, value)
        base.train_base(folder, base.SIZES[size]._replace(vae_steps=3, unet_steps=3))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_base(tmp_path_factory.mktemp("base"))


def test_every_word_is_a_token():
    tokenizer = base.build_tokenizer()
    for scene in SCENES:
        words = scene.caption.split()
        assert tokenizer.convert_ids_to_tokens(tokenizer(scene.caption).input_ids)[1:-1] == [f"{w}</w>" for w in words]


def test_vocabulary_and_merges_describe_the_committed_tokenizer(tmp_path):
    folder = base.ASSETS / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = json.loads((folder / "vocab.json").read_text())
    version, *merges = (folder / "merges.txt").read_text().splitlines()
    assert vocabulary == model["vocab"] and [merge.split() for merge in merges] == model["merges"]
    # The tokenizer of transformers 4 passes over the first line.
    assert version.startswith("#version")
    captions = [scene.caption for scene in SCENES]
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path)(captions).input_ids == tokenizer(captions).input_ids
    # It is also the one that the captions give.
    assert base.build_tokenizer().get_vocab() == tokenizer.get_vocab() == vocabulary


def test_base_model_is_of_the_usual_kind(trained):
    pipeline = load_pipeline(trained)
    assert isinstance(pipeline, StableDiffusionPipeline)
    scenes = SCENES[::15]
    pictures = draw(pipeline, scenes, 0)
    # The noise of a picture is its own, whatever it is drawn together with.
    torch.testing.assert_close(draw(pipeline, scenes[3:5], 3), pictures[3:5], atol=1e-3, rtol=0)


def test_base_model_comes_from_a_seed(trained, tmp_path):
    def contents(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = contents(trained)
    assert contents(train_base(tmp_path / "again")) == first
    assert first.keys() == contents(base.ASSETS).keys()
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (train_base(tmp_path / "other", SEED=1) / unet).read_bytes() != (trained / unet).read_bytes()


def test_committed_base_model_draws_what_is_asked_for():
    pipeline, explanations = load_pipeline(base.ASSETS), Explanations()
    assert sum(path.stat().st_size for path in base.ASSETS.rglob("*") if path.is_file()) < 8e6
    asked, other = SCENES[:10], SCENES[120:130]
    pictures = draw(pipeline, asked, 0)
    assert (
        reward(pictures, asked, explanations).match.mean() > reward(pictures, other, explanations).match.mean() + 0.2
    )
