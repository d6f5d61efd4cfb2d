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

"""Whole Stable Diffusion checkpoints of the real classes with random weights, and preference pairs to train them on."""

import io
import json
import os
import shutil

import numpy as np
import safetensors.torch
import torch
from datasets import Dataset
from PIL import Image
from tiny_unets import sd15_unet, sdxl_unet
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline


try:
    from transformers import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

RESOLUTION = 32


def build_tokenizer(folder):
    """A byte-level CLIP tokenizer, saved in `folder`: every byte is a token, once within and once at the end of a word."""
    symbols = sorted(ByteLevel.alphabet())
    words = symbols + [symbol + "</w>" for symbol in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_config(tokenizer, hidden_size, projection_dim=8):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_parts(**scheduler_options):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
    )
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, **scheduler_options
    )
    return vae, scheduler


def build_sd15(folder, **scheduler_options):
    """An SD 1.x checkpoint (2.x with `prediction_type="v_prediction"`)."""
    tokenizer = build_tokenizer(folder)
    vae, scheduler = build_parts(**scheduler_options)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, hidden_size=16)),
        tokenizer=tokenizer,
        unet=sd15_unet(sample_size=RESOLUTION // 2),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def build_sdxl(folder, **scheduler_options):
    tokenizer = build_tokenizer(folder)
    vae, scheduler = build_parts(**scheduler_options)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, hidden_size=8)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, hidden_size=8)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=sdxl_unet(sample_size=RESOLUTION // 2),
        scheduler=scheduler,
    ).save_pretrained(folder)
    return str(folder)


def build_clip(folder):
    """A CLIP with its processor, for scorers."""
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


def copy_checkpoint(checkpoint, folder):
    """A checkpoint in a folder of its own, to be changed."""
    return shutil.copytree(checkpoint, folder)


def change_weights(folder):
    """Puts other weights in the place of those in a folder or file, of the same size and times."""
    path = next(folder.glob("*.safetensors")) if folder.is_dir() else folder
    stat = path.stat()
    weights = {name: value + 0.1 for name, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path, safetensors.safe_open(path, "pt").metadata())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


def edit_json(path, **entries):
    """Sets entries of a JSON file; `...` removes one."""
    values = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def picture(index, size=(40, 48)):
    """A smooth picture; every index another one."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [np.sin(index + 3 * (channel + 1) * x) * np.cos(2 * index - 4 * y) for channel in range(3)]
    return Image.fromarray(((np.stack(channels, axis=-1) + 1) * 127.5).astype(np.uint8))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pair_columns(num_pairs, num_ties=1):
    """Pairs with bright winners and dark losers, in alternating order, of several sizes, and a few ties at the end."""
    columns = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": []}
    for index in range(num_pairs + num_ties):
        winner = picture(index, size=(40 + index % 3 * 8, 48))
        images = [encoded(winner), encoded(winner.point(lambda value: value // 2))]
        first_wins = index % 2 == 0
        columns["jpg_0"].append(images[0 if first_wins else 1])
        columns["jpg_1"].append(images[1 if first_wins else 0])
        columns["label_0"].append(0.5 if index >= num_pairs else float(first_wins))
        columns["caption"].append(f"picture number {index}")
    return columns


def build_parquet(folder, num_pairs=12, num_ties=1):
    """A local folder of parquet files, as `--dataset_name` takes it."""
    return write_parquet(folder, pair_columns(num_pairs, num_ties))


def write_parquet(folder, columns, features=None):
    folder.mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(str(folder / "train.parquet"))
    return str(folder)


def build_image_folder(folder, num_pairs=12, num_ties=1):
    """Images with a metadata.jsonl, as `--train_data_dir` takes it."""
    (folder / "images").mkdir(parents=True)
    columns = pair_columns(num_pairs, num_ties)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for index, (label, caption) in enumerate(zip(columns["label_0"], columns["caption"])):
            row = {"label_0": label, "caption": caption}
            for column in ("jpg_0", "jpg_1"):
                row[f"{column}_file_name"] = f"images/{index}_{column}.png"
                (folder / row[f"{column}_file_name"]).write_bytes(columns[column][index])
            file.write(json.dumps(row) + "\n")
    return str(folder)
