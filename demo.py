#!/usr/bin/env python
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

"""NCP-DPO from end to end in a few minutes on two CPU cores, without network:

    python demo.py

A small Stable Diffusion learns, from scratch, to draw three photographs and washed-out copies of them. Preference pairs
then say that the photograph is better than its copy, `train_ncp_dpo_sd15.py` trains a LoRA on them, and
`demo/before_after.png` shows what the model draws without it and with it, from the same noise.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path


# Read by the libraries below when they are imported, and by those of the training script.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# A second thread is hardly of use to models this small, and slows them down a lot when something else wants the second
# core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from ncp_loss import NoiseConditionedPerception, adapters_disabled, preference_loss
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils.logging import disable_progress_bar


RESOLUTION = 64
# Photographs that are in scikit-image's package itself, and the square of each that shows its subject: left, top, side.
SUBJECTS = {
    "a photo of an astronaut": (skimage.data.astronaut, (40, 0, 400)),
    "a photo of a cup of coffee": (skimage.data.coffee, (80, 0, 400)),
    "a photo of a cat": (skimage.data.chelsea, (60, 20, 260)),
}
CROPS_PER_SUBJECT = 48
TIES_PER_SUBJECT = 2
VAE_STEPS, VAE_BATCH_SIZE = 450, 4
UNET_STEPS, UNET_BATCH_SIZE = 550, 8
CAPTION_DROPOUT = 0.1
GUIDANCE_SCALE = 2.0
PICTURES_PER_CAPTION = 3
# Stable Diffusion's noise schedule
NOISE_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

START = time.monotonic()


def say(text):
    """Prints a line with the seconds since the start."""
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def build_tokenizer(folder):
    """
    A byte-level CLIP tokenizer that needs no download: every byte is a token, once within and once at the end of a word.

    Args:
        folder (`str` or `Path`): where it is saved, for `CLIPTokenizer.from_pretrained(folder)`.

    Returns:
        `CLIPTokenizer`: with 514 tokens, and prompts of 77 as in Stable Diffusion.
    """
    symbols = sorted(ByteLevel.alphabet())
    words = symbols + [symbol + "</w>" for symbol in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def crop_photograph(photograph, square, rng):
    """A crop of nearly the whole square, shifted a little, at the demo's resolution."""
    left, top, side = square
    cropped_side = int(side * rng.uniform(0.95, 1))
    left += rng.integers(side - cropped_side, endpoint=True)
    top += rng.integers(side - cropped_side, endpoint=True)
    box = (left, top, left + cropped_side, top + cropped_side)
    return photograph.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS, box=box)


def degrade(image):
    """A blurred, washed-out copy: faults that are plain to see and that a LoRA can undo."""
    image = image.filter(ImageFilter.GaussianBlur(1.5))
    image = ImageEnhance.Color(image).enhance(0.15)
    return ImageEnhance.Contrast(image).enhance(0.6)


def write_pairs(folder):
    """
    Writes preference pairs in the format of `--train_data_dir`: photographs win against their degraded copies. A few ties,
    two crops of one photograph, are there to be left out by the training script.

    Returns:
        `list` of `(caption, winner, loser)`: the pairs that are no ties.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pairs, rows = [], []
    for caption, (load_photograph, square) in SUBJECTS.items():
        photograph = Image.fromarray(load_photograph())
        for index in range(CROPS_PER_SUBJECT + TIES_PER_SUBJECT):
            images = [crop_photograph(photograph, square, rng)]
            if index < CROPS_PER_SUBJECT:
                images.append(degrade(images[0]))
                pairs.append((caption, *images))
                label = int(rng.integers(2))
                if label == 0:
                    images.reverse()
            else:
                images.append(crop_photograph(photograph, square, rng))
                label = 0.5
            row = {"label_0": label, "caption": caption}
            for column, image in zip(("jpg_0", "jpg_1"), images):
                row[f"{column}_file_name"] = f"{len(rows):03}_{column}.png"
                image.save(folder / row[f"{column}_file_name"])
            rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs


def to_pixel_values(images):
    """PIL images to a tensor of shape `(N, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def fit(name, model, steps, loss_of_random_batch):
    """Trains a model with Adam at a learning rate that falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=20, num_training_steps=steps)
    for step in range(1, steps + 1):
        loss = loss_of_random_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            say(f"  {name}: step {step} of {steps}, loss {loss.item():.3f}")
    return model.eval().requires_grad_(False)


def train_vae(pixel_values):
    """An autoencoder that makes 4x16x16 latents of the pictures, `scaling_factor` set so that theirs have unit variance."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )

    def loss_of_random_batch():
        images = pixel_values[torch.randint(len(pixel_values), (VAE_BATCH_SIZE,))]
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        kl_per_latent = posterior.kl().mean() / latents[0].numel()
        return F.l1_loss(vae.decode(latents).sample, images) + 4e-4 * kl_per_latent

    fit("VAE", vae, VAE_STEPS, loss_of_random_batch)
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode_images(vae, pixel_values).std().item())
    return vae


@torch.no_grad()
def encode_images(vae, pixel_values):
    """Latents of pixel values, as the training script and pipelines scale them."""
    latents = [vae.encode(images).latent_dist.mode() for images in pixel_values.split(64)]
    return torch.cat(latents) * vae.config.scaling_factor


def build_text_encoder(tokenizer):
    """
    A text encoder with random weights that stay as they are. Drawn widely enough, they already tell the few captions
    apart, and that is all that the U-Net needs.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=10.0,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def train_unet(latents, encoder_hidden_states, empty_hidden_states):
    """
    A U-Net that denoises `latents` given their captions' `encoder_hidden_states`, sometimes the empty caption's, for
    classifier-free guidance.
    """
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=encoder_hidden_states.shape[-1],
        attention_head_dim=4,
        norm_num_groups=8,
    )
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)

    def loss_of_random_batch():
        indices = torch.randint(len(latents), (UNET_BATCH_SIZE,))
        dropped = torch.rand(UNET_BATCH_SIZE, 1, 1) < CAPTION_DROPOUT
        conditioning = torch.where(dropped, empty_hidden_states, encoder_hidden_states[indices])
        noise = torch.randn_like(latents[indices])
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (UNET_BATCH_SIZE,))
        noisy_latents = noise_scheduler.add_noise(latents[indices], noise, timesteps)
        return F.mse_loss(unet(noisy_latents, timesteps, conditioning).sample, noise)

    return fit("U-Net", unet, UNET_STEPS, loss_of_random_batch)


@torch.no_grad()
def encode_captions(tokenizer, text_encoder, captions):
    """Text embeddings of shape `(N, 77, D)`."""
    input_ids = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return text_encoder(input_ids)[0]


def train_base(pairs, folder):
    """A Stable Diffusion that draws a degraded copy twice as often as a photograph, saved in `folder`."""
    torch.manual_seed(0)
    captions, winners, losers = zip(*pairs)
    tokenizer = build_tokenizer(folder / "tokenizer")
    text_encoder = build_text_encoder(tokenizer)
    vae = train_vae(to_pixel_values(winners + losers))
    unet = train_unet(
        encode_images(vae, to_pixel_values(winners + 2 * losers)),
        encode_captions(tokenizer, text_encoder, 3 * captions),
        encode_captions(tokenizer, text_encoder, [""]),
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def train_lora(base, pairs, folder):
    """Runs the training script as a user would."""
    options = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": pairs,
        "resolution": RESOLUTION,
        "no_hflip": None,  # The base model has seen no mirrored photographs.
        "loss_type": "dpo",
        "loss_space": "ncp",
        "rank": 16,
        "use_8bit_adam": None,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "train_batch_size": 4,
        "max_train_steps": 80,
        "seed": 0,
        "output_dir": folder,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command.append(str(Path(__file__).with_name("train_ncp_dpo_sd15.py")))
    for name, value in options.items():
        command += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    say(shlex.join(command))
    subprocess.run(command, check=True)


def load_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline):
    """`PICTURES_PER_CAPTION` pictures of every caption, always from the same noise: `(N, H, W, 3)` in [0, 1]."""
    captions = [caption for caption in SUBJECTS for _ in range(PICTURES_PER_CAPTION)]
    generators = [torch.Generator().manual_seed(index) for index in range(len(captions))]
    return pipeline(
        captions,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=25,
        guidance_scale=GUIDANCE_SCALE,
        generator=generators,
        output_type="np",
    ).images


@torch.no_grad()
def measure_implicit_accuracy(pipeline, pairs):
    """
    The share of the pairs whose winner the policy denoises better, in the eyes of the frozen U-Net, than the reference
    does, more so than the loser. Timesteps are spread over all there are; they and the noise are the same in every call.
    """
    captions, winners, losers = zip(*pairs)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    perception = NoiseConditionedPerception(pipeline.unet, noise_scheduler)

    generator = torch.Generator().manual_seed(0)
    latents = encode_images(pipeline.vae, to_pixel_values(winners + losers))
    noise = torch.randn(len(pairs), *latents.shape[1:], generator=generator).repeat(2, 1, 1, 1)
    timesteps = torch.linspace(0, noise_scheduler.config.num_train_timesteps - 1, len(pairs)).long()
    timesteps = timesteps[torch.randperm(len(pairs), generator=generator)].repeat(2)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    encoder_hidden_states = encode_captions(pipeline.tokenizer, pipeline.text_encoder, captions).repeat(2, 1, 1)

    with adapters_disabled(pipeline.unet):
        ref_pred = pipeline.unet(noisy_latents, timesteps, encoder_hidden_states).sample
    model_pred = pipeline.unet(noisy_latents, timesteps, encoder_hidden_states).sample
    anchor = perception.anchor(noisy_latents, timesteps, noise, encoder_hidden_states, ref_pred=ref_pred)
    return preference_loss(perception.error(model_pred, anchor), anchor.ref_errors).implicit_accuracy.item()


def measure_colour(images):
    """Mean difference of the strongest and the weakest colour channel, 0 for grey to 1; `images`: `(N, H, W, 3)`."""
    return float((images.max(axis=-1) - images.min(axis=-1)).mean())


def measure_sharpness(images):
    """Mean difference of neighbouring pixels, 0 to 1; `images`: `(N, H, W, 3)` in [0, 1]."""
    return float(np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean()) / 2


def save_before_after(before, after, path):
    """Writes both sets of pictures, enlarged, one above the other, with captions."""
    side, margin, header = 112, 8, 56
    column_width, row_height = side + margin, side + 28
    picture = Image.new("RGB", (len(before) * column_width + margin, header + 2 * row_height), "white")
    draw_on, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for index, caption in enumerate(SUBJECTS):
        draw_on.text((margin + index * PICTURES_PER_CAPTION * column_width, 6), f"“{caption}”", "black", font)
    rows = {"Base model": before, "With the NCP-DPO LoRA, from the same noise": after}
    for row, (title, images) in enumerate(rows.items()):
        top = header + row * row_height
        draw_on.text((margin, top - 22), title, "black", font)
        for column, image in enumerate(StableDiffusionPipeline.numpy_to_pil(images)):
            enlarged = image.resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(enlarged, (margin + column * column_width, top))
    picture.save(path)


def main(output_dir):
    disable_progress_bar()
    base, lora = output_dir / "base", output_dir / "lora"

    say("1/5 Writing preference pairs from three photographs")
    pairs = write_pairs(output_dir / "pairs")

    say("2/5 Training a small Stable Diffusion from scratch on photographs and degraded copies")
    train_base(pairs, base)

    say("3/5 Drawing pictures with it")
    pipeline = load_pipeline(base)
    before, accuracy_before = draw(pipeline), measure_implicit_accuracy(pipeline, pairs)

    say("4/5 Training a LoRA to prefer the photographs")
    train_lora(base, output_dir / "pairs", lora)

    say("5/5 Drawing the same pictures with the LoRA")
    pipeline.load_lora_weights(lora)
    after, accuracy_after = draw(pipeline), measure_implicit_accuracy(pipeline, pairs)
    save_before_after(before, after, output_dir / "before_after.png")

    _, winners, losers = zip(*pairs)
    say("Done. What the pictures look like:")
    print(f"{'':20}{'colour':>10}{'sharpness':>12}")
    for name, images in {
        "photographs": np.stack(winners) / 255,
        "degraded copies": np.stack(losers) / 255,
        "base model": before,
        "with the LoRA": after,
    }.items():
        print(f"{name:20}{measure_colour(images):10.3f}{measure_sharpness(images):12.4f}")
    print(
        f"Implicit accuracy on the training pairs: {accuracy_before:.2f} before, {accuracy_after:.2f} after training"
    )
    print(f"See {output_dir / 'before_after.png'}")

    if np.array_equal(before, after):
        sys.exit("Failed: the LoRA does not change the pictures.")
    if accuracy_after <= 0.6:
        sys.exit("Failed: the LoRA has not learnt the preference.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="Where everything is written.")
    main(parser.parse_args().output_dir)
