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


import eval_win_rate
import pytest
import scorer_models
import scorers
import torch
from conftest import ROOT
from PIL import Image
from scenes import RESOLUTION, SCENES
from tiny_checkpoints import picture
from transformers import (
    AutoProcessor,
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPModel,
)
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel


IMAGES = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 200)]
PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def own(tmp_path):
    """Writes a file of a user's scorers, and loads scorers by the values of the flag."""

    def load(source, *texts):
        (tmp_path / "mine.py").write_text(source)
        texts = texts or (f"{tmp_path / 'mine.py'}:redness",)
        words = ["--pretrained_model_name_or_path", "none", "--scorers", *texts]
        return scorers.load_scorers(eval_win_rate.parse_args(words))

    return load


REDNESS = "def redness(images, prompts):\n    return [image.getpixel((0, 0))[0] + len(prompt) for image, prompt in zip(images, prompts)]\n"


@pytest.mark.parametrize(
    "kind",
    ["[{}]", "numpy.array([{}])", "torch.tensor([{}])", "[torch.tensor(x) for x in [{}]]"],
    ids=["list", "array", "tensor", "tensors"],
)
def test_a_users_function_scores(own, kind):
    values = kind.format("image.getpixel((0, 0))[0] + len(prompt) / 7 for image, prompt in zip(images, prompts)")
    (scorer,) = own(f"import numpy, torch\ndef redness(images, prompts):\n    return {values}\n").values()
    assert scorer(PROMPTS, IMAGES).tolist() == pytest.approx([10 + 5 / 7, 200 + 5 / 7], rel=1e-6)


def test_a_changed_file_is_another_version(own, tmp_path):
    first, again, changed = (own(source)["mine.redness"] for source in (REDNESS, REDNESS, REDNESS.replace("+", "-")))
    assert first.version == again.version != changed.version
    assert first.version.startswith("mine.py:redness@") and str(tmp_path) not in first.version
    assert first(PROMPTS, IMAGES).tolist() == [15, 205] and changed(PROMPTS, IMAGES).tolist() == [5, 195]


def test_functions_of_one_file_share_it(own):
    file = ROOT / "small_world" / "judges.py"
    loaded = own("", f"{file}:total", f"{file}:noisy_total", f"{file}:total")
    assert list(loaded) == ["judges.total", "judges.noisy_total"]
    total, noisy = (scorer.function for scorer in loaded.values())
    assert total.__globals__ is noisy.__globals__
    image = Image.new("RGB", (RESOLUTION, RESOLUTION), "red")
    assert 0 < loaded["judges.total"]([SCENES[0].caption], [image]).item() < 20


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "source, message",
    [
        ("def other(images, prompts): pass", "mine.py has no function redness. It has other."),
        ("redness = 3", "has no function redness. It has none."),
        ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this"),
        (
            "def redness(images, prompts): return [1.0]",
            r"returned scores of shape \(1,\) for 2 images, but must return one",
        ),
        ("def redness(images, prompts): return [[1.0]] * 2", r"of shape \(2, 1\) for 2 images"),
        ("def redness(images, prompts): return ['a', 'b']", r"returned \['a', 'b'\], but must return one number"),
        ("def redness(images, prompts): return None", "returned None, but must return one number"),
    ],
    ids=["function", "callable", "import", "count", "shape", "text", "none"],
)
def test_functions_that_do_not_score_are_named(own, source, message):
    with pytest.raises(ValueError, match=f"--scorers .*mine.py:redness.*{message}"):
        own(source)["mine.redness"](PROMPTS, IMAGES)


@pytest.mark.bad_input
def test_an_error_in_a_users_function_keeps_its_traceback(own):
    with pytest.raises(
        RuntimeError, match="--scorers .*mine.py:redness failed for 2 images, the first of 'a cat'"
    ) as raised:
        own("def redness(images, prompts): return [1 / 0]")["mine.redness"](PROMPTS, IMAGES)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@pytest.mark.bad_input
def test_flags_that_name_no_scorer(own, tmp_path, capsys):
    for text in ("pickscor", "mine.py", "mine.py:", "mine.py:a-b", "mine:redness"):
        with pytest.raises(SystemExit):
            own("", text)
        error = " ".join(capsys.readouterr().err.split())
        assert f"argument --scorers: {text}, but must be pickscore, clipscore" in error and "file.py:function" in error
    with pytest.raises(ValueError, match="--scorers nowhere.py:redness: there is no file nowhere.py"):
        own("", "nowhere.py:redness")
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path, tmp_path / "folder"):
        (folder / "mine.py").write_text(REDNESS)
    with pytest.raises(ValueError, match="are both called mine.redness. Rename one of the files"):
        own(REDNESS, *(f"{folder / 'mine.py'}:redness" for folder in (tmp_path, tmp_path / "folder")))


def load(name, **options):
    words = [word for flag, value in options.items() for word in (f"--{flag}", str(value))]
    args = eval_win_rate.parse_args(["--pretrained_model_name_or_path", "none", "--scorers", name, *words])
    return scorers.load_scorers(args)[name]


def to_open_clip(state):
    """The weights of a `CLIPModel` as open_clip names and lays them out."""
    renamed = {"logit_scale": state["logit_scale"]}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        vision = bool(prefix)
        norms = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final"}
        for theirs, ours in norms.items():
            for kind in ("weight", "bias"):
                if f"{tower}.{theirs}.{kind}" in state:
                    renamed[f"{prefix}{ours}.{kind}"] = state[f"{tower}.{theirs}.{kind}"]
        renamed[f"{prefix}positional_embedding"] = state[f"{tower}.embeddings.position_embedding.weight"]
        if vision:
            renamed["visual.class_embedding"] = state[f"{tower}.embeddings.class_embedding"]
            renamed["visual.conv1.weight"] = state[f"{tower}.embeddings.patch_embedding.weight"]
            renamed["visual.proj"] = state["visual_projection.weight"].T
        else:
            renamed["token_embedding.weight"] = state[f"{tower}.embeddings.token_embedding.weight"]
            renamed["text_projection"] = state["text_projection.weight"].T
        number = 0
        while f"{tower}.encoder.layers.{number}.mlp.fc1.bias" in state:
            layer, block = f"{tower}.encoder.layers.{number}", f"{prefix}transformer.resblocks.{number}"
            for kind in ("weight", "bias"):
                parts = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                for theirs, ours in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    renamed[f"{block}.{ours}.{kind}"] = state[f"{layer}.{theirs}.{kind}"]
            number += 1
    return renamed


@pytest.fixture(scope="module")
def hpsv2(clip, tmp_path_factory):
    """A tiny `CLIPModel` with weights that differ from layer to layer, and a file of them in open_clip's layout."""
    torch.manual_seed(1)
    model = CLIPModel.from_pretrained(clip).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("hpsv2") / "HPS.pt"
    torch.save({"state_dict": to_open_clip(model.state_dict())}, path)
    return model, path


PICTURES = [picture(1, (40, 40)), picture(2, (23, 40)), picture(3, (40, 16))]
PROMPTS_OF_PICTURES = ["a cat", "a bird, asleep", "x"]


@torch.no_grad()
def test_hpsv2_of_a_file_in_the_layout_of_open_clip(clip, hpsv2):
    model, path = hpsv2
    scorer = load("hpsv2", hpsv2_base_name_or_path=clip, hpsv2_weights=path)
    inputs = AutoProcessor.from_pretrained(clip)(
        text=PROMPTS_OF_PICTURES, images=PICTURES, padding=True, return_tensors="pt"
    )
    pixel_values = torch.stack([scorer.prepare(image) for image in PICTURES])
    # Transformers resizes with PIL, which rounds.
    assert (pixel_values[:1] - inputs.pixel_values[:1]).abs().max() < 0.1
    expected = model(**{**inputs, "pixel_values": pixel_values})
    scores = scorer(PROMPTS_OF_PICTURES, PICTURES)
    torch.testing.assert_close(scores, (expected.text_embeds * expected.image_embeds).sum(dim=1))
    assert scores.unique().numel() == 3 and scorer.version.startswith("HPS.pt@")


@pytest.fixture(scope="module")
def imagereward(tmp_path_factory):
    """Tiny models of BLIP and the linear layers of ImageReward, a file of them as published, and a tokenizer."""
    folder = tmp_path_factory.mktemp("imagereward")
    torch.manual_seed(1)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(mark + chr(97 + k) for mark in ("", "##") for k in range(26)),
    ]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96}
    vision = BlipVisionConfig(
        hidden_size=128, num_attention_heads=2, image_size=16, patch_size=8, layer_norm_eps=1e-6, **sizes
    )
    ids = {"vocab_size": 60, "bos_token_id": 1, "sep_token_id": 3, "max_position_embeddings": 40}
    text = BlipTextConfig(hidden_size=64, num_attention_heads=1, encoder_hidden_size=128, **ids, **sizes)
    models = (
        BlipVisionModel(vision).eval(),
        BlipTextModel(text, add_pooling_layer=False).eval(),
        scorer_models.linear_layers(64),
    )
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "post_layernorm": "norm",
        "layer_norm": "norm",
        "self_attn.projection": "attn.proj",
        "self_attn.qkv": "attn.qkv",
    }
    state = {}
    for name, tensor in models[0].state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[f"blip.visual_encoder.{name}"] = tensor
    state |= {f"blip.text_encoder.{name}": tensor for name, tensor in models[1].state_dict().items()}
    state |= {f"mlp.layers.{name}": tensor for name, tensor in models[2].state_dict().items()}
    # What the file has besides.
    state |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.text_proj.bias": torch.zeros(2),
    }
    torch.save(state, folder / "ImageReward.pt")
    return models, folder


@torch.no_grad()
def test_imagereward_of_its_file(imagereward):
    (vision, text, head), folder = imagereward
    options = {"imagereward_tokenizer_name_or_path": folder, "imagereward_weights": folder / "ImageReward.pt"}
    scorer = load("imagereward", **options)
    tokens = BertTokenizer.from_pretrained(folder)(
        PROMPTS_OF_PICTURES, padding="max_length", max_length=35, return_tensors="pt"
    )
    seen = vision(torch.stack([scorer.prepare(image) for image in PICTURES])).last_hidden_state
    read = text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
    expected = (head(read[:, 0]).flatten() - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(scorer(PROMPTS_OF_PICTURES, PICTURES), expected)


@pytest.mark.bad_input
def test_weights_that_do_not_fit_are_named(clip, hpsv2, imagereward, tmp_path):
    hps, reward = hpsv2[1], imagereward[1] / "ImageReward.pt"
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    state = torch.load(hps)["state_dict"]
    torch.save({"state_dict": {**state, "visual.ln_pre.bias": torch.zeros(3)}}, tmp_path / "sizes.pt")
    for scorer, path, message in [
        (
            "hpsv2",
            "nowhere.pt",
            "--hpsv2_weights: there is no file nowhere.pt. Give HPS_v2.1_compressed.pt of xswu/HPSv2",
        ),
        ("hpsv2", tmp_path / "text.pt", "--hpsv2_weights .*text.pt cannot be read as weights of PyTorch"),
        ("hpsv2", tmp_path / "sizes.pt", "--hpsv2_weights .*sizes.pt does not fit CLIPModel"),
        ("hpsv2", reward, "--hpsv2_weights .* does not fit CLIPModel: logit_scale, .* are missing"),
        ("imagereward", hps, "--imagereward_weights .* has no blip.visual_encoder. or no blip.text_encoder."),
    ]:
        with pytest.raises(ValueError, match=message):
            load(scorer, hpsv2_base_name_or_path=clip, **{f"{scorer}_weights": path})
