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

"""Trains the base model of the small world, a Stable Diffusion of two million parameters, into `assets/small-world`.

    python small_world/base.py     # from scratch: half an hour on two cores
    python small_world/base.py --size strong --output_dir small-world-strong/base     # an hour, six million parameters

It trains on pictures that `scenes.py` draws, half of them badly. So it draws some pictures better than others, and there is
something to prefer.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scenes import RESOLUTION, SCENES, render
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel


ASSETS = Path(__file__).resolve().parents[1] / "assets" / "small-world"
NOISE_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SEED = 0
NUM_PICTURES = 16_000
WRONG_CAPTIONS = 0.1
CAPTION_DROPOUT = 0.1
VAE_BATCH_SIZE, UNET_BATCH_SIZE = 8, 32


class Size(NamedTuple):
    """The channels of a base model, and the steps that it is trained for."""

    vae_channels: tuple
    vae_steps: int
    unet_channels: tuple
    unet_steps: int


SIZES = {
    "small": Size((16, 32, 48), 4_000, (32, 64, 88), 6_000),
    "strong": Size((24, 48, 64), 8_000, (48, 96, 128), 8_000),
}


def build_tokenizer():
    """Returns a CLIP tokenizer that makes one token of every word of a caption."""
    words = sorted({word for scene in SCENES for word in scene.caption.split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # Special tokens get the same ids every time. So ties between merges are broken the same way every time.
    last_letters = sorted({f"{word[-1]}</w>" for word in words})
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(end_of_word_suffix="</w>", special_tokens=last_letters, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    vocabulary = [*model["vocab"], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[tuple(merge) for merge in model["merges"]],
        model_max_length=16,
    )


def save_vocabulary(folder):
    """Writes `vocab.json` and `merges.txt` from a tokenizer's `tokenizer.json`. Transformers 4 reads these."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"])])
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")


def fit(name, model, parameters, num_steps, learning_rate, loss_of_random_batch):
    """Trains by AdamW with a cosine schedule. Then gives `model` the moving average of its weights, and freezes it."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, num_steps // 50, num_steps)
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True)
    progress_bar = tqdm(range(num_steps), desc=name)
    average = None
    for _ in progress_bar:
        loss = loss_of_random_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(parameters)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        progress_bar.set_postfix(loss=f"{average:.4f}")
    ema.copy_to(parameters)
    model.eval().requires_grad_(False)


def train_vae(pictures, size):
    """Trains an autoencoder on `pictures` `(N, 3, H, W)` in [-1, 1]. Its scaled latents have unit variance."""
    vae = AutoencoderKL(
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=RESOLUTION,
    )

    def loss_of_random_batch():
        batch = pictures[torch.randint(len(pictures), (VAE_BATCH_SIZE,))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 1e-5 * posterior.kl().mean() / RESOLUTION

    fit("VAE", vae, list(vae.parameters()), size.vae_steps, 2e-3, loss_of_random_batch)
    latents = encode(vae, pictures[:1000])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


@torch.no_grad()
def encode(vae, pictures):
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(250)])


def train_denoiser(tokenizer, captions, latents, size):
    """Trains the text encoder and the U-Net together. Some captions are left empty, for classifier-free guidance."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        block_out_channels=size.unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    input_ids, empty = (
        tokenizer(texts, padding="max_length", return_tensors="pt").input_ids for texts in (captions, [""])
    )

    def loss_of_random_batch():
        index = torch.randint(len(latents), (UNET_BATCH_SIZE,))
        dropped = torch.rand(len(index), 1) < CAPTION_DROPOUT
        encoder_hidden_states = text_encoder(torch.where(dropped, empty, input_ids[index]))[0]
        noise = torch.randn_like(latents[index])
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(index),))
        noisy_latents = noise_scheduler.add_noise(latents[index], noise, timesteps)
        return F.mse_loss(unet(noisy_latents, timesteps, encoder_hidden_states).sample, noise)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    fit("U-Net", unet, parameters, size.unet_steps, 1e-3, loss_of_random_batch)
    return text_encoder.eval().requires_grad_(False), unet


def train_base(folder, size):
    """Trains a Stable Diffusion on well and badly drawn pictures, and saves it in half precision."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    scenes = random.choices(SCENES, k=NUM_PICTURES)
    pictures = torch.cat([render(scenes[start : start + 500], generator) for start in range(0, len(scenes), 500)])
    pictures = 2 * pictures - 1
    captions = [(random.choice(SCENES) if random.random() < WRONG_CAPTIONS else scene).caption for scene in scenes]

    vae = train_vae(pictures, size)
    tokenizer = build_tokenizer()
    latents = encode(vae, pictures) * vae.config.scaling_factor
    text_encoder, unet = train_denoiser(tokenizer, captions, latents, size)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)
    save_vocabulary(Path(folder) / "tokenizer")
    name_as_older_versions(Path(folder) / "text_encoder" / "model.safetensors")


def name_as_older_versions(path):
    """Gives the text encoder's weights the names of SD 1.5's files. transformers 5.0 knows no others, and would load none."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--output_dir", type=Path, default=ASSETS)
    args = parser.parse_args()
    # The number of threads changes the order of sums, and so the model.
    torch.set_num_threads(2)
    train_base(args.output_dir, SIZES[args.size])
