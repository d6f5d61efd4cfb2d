# coding=utf-8
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

"""HPSv2.1 and ImageReward in the classes of Transformers, from the files that their authors published.

Their own packages, hpsv2 and image-reward, cannot be imported beside Transformers 5. Here the weights get the names that
Transformers has for them. Pictures are prepared as those packages do, without torchvision.
"""

import re
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from preference_pairs import digest_files, one_line
from scorer_models import linear_layers
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel


# Names of open_clip and of timm, and those of Transformers, in the order in which they are replaced.
CLIP_NAMES = {
    r"^visual\.transformer\.resblocks": "vision_model.encoder.layers",
    r"^transformer\.resblocks": "text_model.encoder.layers",
    r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1": "vision_model.embeddings.patch_embedding",
    r"^visual\.ln_pre": "vision_model.pre_layrnorm",
    r"^visual\.ln_post": "vision_model.post_layernorm",
    r"^visual\.proj$": "visual_projection.weight",
    r"^token_embedding": "text_model.embeddings.token_embedding",
    r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"^ln_final": "text_model.final_layer_norm",
    r"^text_projection$": "text_projection.weight",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.out_proj": ".self_attn.out_proj",
    r"\.attn\.in_proj_": ".self_attn.in_proj.",
    r"\.mlp\.c_fc": ".mlp.fc1",
    r"\.mlp\.c_proj": ".mlp.fc2",
}
VIT_NAMES = {
    "^cls_token": "embeddings.class_embedding",
    "^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    "^blocks": "encoder.layers",
    r"^norm\.": "post_layernorm.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv": ".self_attn.qkv",
    r"\.attn\.proj": ".self_attn.projection",
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def find_weights(flag, path, repository, name):
    """The file `path` of a flag, or the published one. A `ValueError` names the flag if there is none."""
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"--{flag}: there is no file {path}. Give {name} of {repository}.")
        return path
    try:
        return hf_hub_download(repository, name)
    except Exception as error:  # Hub and network raise many kinds.
        reason = f"{name} of {repository} cannot be downloaded: {one_line(error)}"
        raise ValueError(f"{reason}. Give the file with --{flag}.") from error


def load_weights(flag, path):
    """The tensors of a file that `torch.save` wrote, in fp32. A `ValueError` names the flag if it holds something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float() for name, tensor in state.get("state_dict", state).items()}
    except Exception as error:  # torch and pickle raise many kinds.
        raise ValueError(f"--{flag} {path} cannot be read as weights of PyTorch: {one_line(error)}") from error


def create_model(model_class, config, weights, flag, path, **options):
    """A model of Transformers with these weights. A `ValueError` names the flag if they do not fit."""
    source = {"config": config, "state_dict": weights, "output_loading_info": True}
    try:
        # The constructor would draw a billion random numbers first.
        model, info = model_class.from_pretrained(None, **source, **options)
    except RuntimeError as error:
        raise ValueError(f"--{flag} {path} does not fit {model_class.__name__}: {one_line(error)}") from error
    for problem in ("missing", "unexpected"):
        if names := sorted(info[f"{problem}_keys"]):
            names = ", ".join(names[:3])
            raise ValueError(f"--{flag} {path} does not fit {model_class.__name__}: {names} and so on are {problem}.")
    return model.eval()


def version_of(path):
    return f"{Path(path).name}@{digest_files([path])[:12]}"


def rename(weights, names):
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def from_open_clip(weights):
    """The weights of an open_clip `CLIP` under the names of Transformers' `CLIPModel`."""
    converted = {}
    for name, tensor in rename(weights, CLIP_NAMES).items():
        if ".in_proj." in name:
            # Queries, keys and values are one matrix there.
            for part, value in zip("qkv", tensor.chunk(3)):
                converted[name.replace("in_proj", f"{part}_proj")] = value
        else:
            # These multiply from the right there.
            converted[name] = tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor
    return converted


def scaled_size(image, side):
    """The (width, height) of an image whose shorter side becomes `side`."""
    shorter = min(image.size)
    return tuple(side if length == shorter else int(side * length / shorter) for length in image.size)


def crop_center(pixels, side):
    """The middle `(3, side, side)` of pixels `(3, H, W)`."""
    top, left = (round((length - side) / 2) for length in pixels.shape[1:])
    return pixels[:, top : top + side, left : left + side]


def to_pixels(image):
    """Pixels `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def normalize(pixels):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


class HPSv2(torch.nn.Module):
    """
    HPSv2 (https://arxiv.org/abs/2306.09341): the cosine of a CLIP ViT-H/14's embeddings of prompt and picture. `base` has the
    configuration and the tokenizer. `weights` is a file in open_clip's layout.
    """

    def __init__(self, base, weights):
        super().__init__()
        state = from_open_clip(load_weights("hpsv2_weights", weights))
        self.model = create_model(CLIPModel, CLIPConfig.from_pretrained(base), state, "hpsv2_weights", weights)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.version = version_of(weights)

    def prepare(self, image):
        side = self.model.config.vision_config.image_size
        width, height = scaled_size(image, side)
        # The package resizes floats. PIL would round them.
        pixels = torch.nn.functional.interpolate(
            to_pixels(image)[None], (height, width), mode="bicubic", antialias=True
        )
        return normalize(crop_center(pixels[0], side))

    def forward(self, prompts, images):
        text = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        pixel_values = torch.stack([self.prepare(image) for image in images])
        outputs = self.model(**text.to(self.model.device), pixel_values=pixel_values.to(self.model.device))
        return torch.nn.functional.cosine_similarity(outputs.text_embeds, outputs.image_embeds)


class ImageReward(torch.nn.Module):
    """
    ImageReward (https://arxiv.org/abs/2304.05977): BLIP's text encoder reads the prompt with attention to the picture, and
    linear layers score what it made of the first token. All sizes are those of `weights`.
    """

    HEAD_WIDTH, MAX_TOKENS = 64, 35
    # Of the scores of its training pictures.
    MEAN, STD = 0.16717362830052426, 1.0333394966054072

    def __init__(self, tokenizer, weights):
        super().__init__()
        parts = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
        for name, tensor in load_weights("imagereward_weights", weights).items():
            for prefix, part in parts.items():
                if name.startswith(prefix) and not name.endswith("position_ids"):
                    part[name.removeprefix(prefix)] = tensor
        vision, text, head = parts.values()
        if not (vision and text and head):
            raise ValueError(
                f"--imagereward_weights {weights} has no {' or no '.join(p for p in parts if not parts[p])}."
            )
        place = "imagereward_weights", weights
        vision_config, text_config = self.vision_config(vision), self.text_config(text)
        self.vision_model = create_model(BlipVisionModel, vision_config, rename(vision, VIT_NAMES), *place)
        self.text_model = create_model(BlipTextModel, text_config, text, *place, add_pooling_layer=False)
        self.head = linear_layers(text_config.hidden_size)
        self.head.load_state_dict(head)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.version = version_of(weights)

    def vision_config(self, weights):
        (width, _, patch, _), positions = weights["patch_embed.proj.weight"].shape, weights["pos_embed"].shape[1]
        return BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(weights["blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=sum(name.endswith("norm1.bias") for name in weights),
            num_attention_heads=width // self.HEAD_WIDTH,
            patch_size=patch,
            image_size=patch * round((positions - 1) ** 0.5),
            layer_norm_eps=1e-6,
        )

    def text_config(self, weights):
        vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
        return BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=len(weights["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=sum(name.endswith("intermediate.dense.bias") for name in weights),
            num_attention_heads=width // self.HEAD_WIDTH,
            max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
        )

    def prepare(self, image):
        side = self.vision_model.config.image_size
        return normalize(
            crop_center(to_pixels(image.resize(scaled_size(image, side), Image.Resampling.BICUBIC)), side)
        )

    def forward(self, prompts, images):
        device = self.text_model.device
        options = {"padding": True, "truncation": True, "max_length": self.MAX_TOKENS, "return_tensors": "pt"}
        text = self.tokenizer(prompts, **options).to(device)
        seen = self.vision_model(torch.stack([self.prepare(image) for image in images]).to(device)).last_hidden_state
        read = self.text_model(text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=seen)
        return (self.head(read.last_hidden_state[:, 0]).flatten() - self.MEAN) / self.STD
