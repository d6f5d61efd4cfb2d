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

"""Models that score pictures of prompts, for `eval_win_rate.py` and `collect_preferences.py judge`."""

import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from picture_records import digest_of_file, load_picture
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor


# Pictures of a batch, which all scorers see at once.
SCORING_BATCH_SIZE = 16


def add_scorer_arguments(parser):
    add = parser.add_argument_group("scores").add_argument
    add("--scorers", nargs="+", default=["pickscore", "clipscore"], choices=list(SCORERS))
    add("--pickscore_model_name_or_path", default="yuvalkirstain/PickScore_v1")
    add("--pickscore_processor_name_or_path", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    add("--clipscore_model_name_or_path", default="openai/clip-vit-large-patch14")
    aesthetic = (
        "File sac+logos+ava1-l14-linearMSE.pth of LAION's aesthetic predictor, for --clipscore_model_name_or_path."
    )
    add("--aesthetic_weights", help=aesthetic)


class CLIPSimilarity(torch.nn.Module):
    """Cosine of a CLIP's embeddings of prompt and picture, times `factor` or the model's own temperature."""

    def __init__(self, model, processor, factor=None):
        super().__init__()
        self.model = AutoModel.from_pretrained(model).eval()
        self.processor = AutoProcessor.from_pretrained(processor)
        self.factor = self.model.logit_scale.exp().item() if factor is None else factor
        self.version = "@".join(filter(None, [str(model), getattr(self.model.config, "_commit_hash", None)]))

    def embed(self, prompts, images):
        """Unit vectors of prompts and of pictures, each of shape `(B, D)`."""
        inputs = self.processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device))
        return outputs.text_embeds, outputs.image_embeds

    def forward(self, prompts, images):
        return self.factor * torch.nn.functional.cosine_similarity(*self.embed(prompts, images))


class Aesthetic(CLIPSimilarity):
    """LAION's aesthetic predictor: linear layers on a picture's CLIP ViT-L/14 embedding. Scores are about 1 to 10."""

    def __init__(self, model, weights):
        super().__init__(model, model)
        sizes = (self.model.config.projection_dim, 1024, 128, 64, 16, 1)
        linear = [torch.nn.Linear(*shape) for shape in zip(sizes, sizes[1:])]
        # The numbers in the file count the dropout layers between the first ones.
        self.head = torch.nn.Sequential(
            *(layer for pair in zip(linear[:3], 3 * [torch.nn.Identity()]) for layer in pair), *linear[3:]
        )
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.head.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
        self.version = f"{Path(weights).name}@{digest_of_file(weights)[:12]}"

    def forward(self, prompts, images):
        _, pictures = self.embed(prompts, images)
        return self.head(pictures).flatten()


class HPSv2(torch.nn.Module):
    """HPSv2.1 with the model of its package, whose own `score` would load the weights anew for every picture."""

    def __init__(self):
        super().__init__()
        from hpsv2 import img_score
        from hpsv2.src.open_clip import get_tokenizer

        img_score.device = "cpu"
        img_score.initialize_model()
        self.model, self.preprocess = (img_score.model_dict[name] for name in ("model", "preprocess_val"))
        self.version = "HPS_v2.1_compressed.pt"
        weights = torch.load(hf_hub_download("xswu/HPSv2", self.version), map_location="cpu")
        self.model.load_state_dict(weights["state_dict"])
        self.model.eval()
        self.tokenizer = get_tokenizer("ViT-H-14")

    def forward(self, prompts, images):
        device = next(self.model.parameters()).device
        images = torch.stack([self.preprocess(image) for image in images]).to(device)
        outputs = self.model(images, self.tokenizer(prompts).to(device))
        return torch.linalg.vecdot(outputs["image_features"], outputs["text_features"])


class ImageReward(torch.nn.Module):
    """ImageReward with the model of its package, whose own `score` takes one picture, in some versions by its path only."""

    version = "ImageReward-v1.0"

    def __init__(self):
        super().__init__()
        import ImageReward as package

        self.model = package.load(self.version, device="cpu").eval()

    def forward(self, prompts, images):
        device, blip = next(self.model.parameters()).device, self.model.blip
        # Of as many tokens as it was trained with.
        text = blip.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        seen = blip.visual_encoder(torch.stack([self.model.preprocess(image) for image in images]).to(device))
        read = blip.text_encoder(
            text.input_ids.to(device),
            attention_mask=text.attention_mask.to(device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=device),
            return_dict=True,
        )
        return (self.model.mlp(read.last_hidden_state[:, 0]).flatten() - self.model.mean) / self.model.std


def load_pickscore(args):
    return CLIPSimilarity(args.pickscore_model_name_or_path, args.pickscore_processor_name_or_path)


def load_clipscore(args):
    return CLIPSimilarity(args.clipscore_model_name_or_path, args.clipscore_model_name_or_path, factor=100)


def load_aesthetic(args):
    if args.aesthetic_weights is None:
        raise ValueError("--scorers aesthetic needs --aesthetic_weights, the file sac+logos+ava1-l14-linearMSE.pth.")
    return Aesthetic(args.clipscore_model_name_or_path, args.aesthetic_weights)


def load_hpsv2(args):
    if importlib.util.find_spec("hpsv2") is None:
        raise ImportError("To score with HPSv2.1, please install hpsv2: `pip install hpsv2`.")
    return HPSv2()


def load_imagereward(args):
    if importlib.util.find_spec("ImageReward") is None:
        raise ImportError("To score with ImageReward, please install it: `pip install image-reward`.")
    return ImageReward()


SCORERS = {
    "pickscore": load_pickscore,
    "clipscore": load_clipscore,
    "hpsv2": load_hpsv2,
    "imagereward": load_imagereward,
    "aesthetic": load_aesthetic,
}


@torch.no_grad()
def score_pictures(accelerator, scorers, prompts, paths, description="Scoring"):
    """
    Scores of pictures of prompts, `{scorer: [score of each]}`, complete on every process. A `ValueError` names a picture
    without a finite score. Scorers run in fp32: half precision would decide close contests by rounding.
    """
    for scorer in scorers.values():
        scorer.to(accelerator.device)
    scores = torch.zeros(len(scorers), len(paths), device=accelerator.device)
    starts = range(0, len(paths), SCORING_BATCH_SIZE)[accelerator.process_index :: accelerator.num_processes]
    batches = [slice(start, start + SCORING_BATCH_SIZE) for start in starts]
    with ThreadPoolExecutor() as pool:
        next_images = pool.map(load_picture, paths[batches[0]]) if batches else []
        bar = tqdm(batches, desc=description, disable=not accelerator.is_local_main_process)
        for batch, next_batch in zip(bar, [*batches[1:], slice(0)]):
            # The next batch is decoded while this one is scored.
            images, next_images = list(next_images), pool.map(load_picture, paths[next_batch])
            for index, scorer in enumerate(scorers.values()):
                scores[index, batch] = scorer(prompts[batch], images).float()
    scores = accelerator.reduce(scores).tolist()
    for name, values in zip(scorers, scores):
        for path, score in zip(paths, values):
            if not math.isfinite(score):
                raise ValueError(f"{path}: its {name} is {score}.")
    return dict(zip(scorers, scores))
