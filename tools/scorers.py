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

"""What scores pictures of prompts, for `eval_win_rate.py` and `collect_preferences.py judge`."""

import argparse
import importlib.util
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.utils import gather_object
from picture_records import digest_of_file, load_picture
from preference_pairs import digest_part, one_line
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor


# Pictures of a batch, which all scorers see at once.
SCORING_BATCH_SIZE = 16


def scorer_type(text):
    """The type of `--scorers` for argparse: one of `SCORERS` or `file.py:function`."""
    file, _, function = text.rpartition(":")
    if text in SCORERS or (file.endswith(".py") and function.isidentifier()):
        return text
    raise argparse.ArgumentTypeError(
        f"{text}, but must be {', '.join(SCORERS)} or a function of yours, file.py:function"
    )


def add_scorer_arguments(parser):
    add = parser.add_argument_group("scores").add_argument
    scorers = (
        f"Any of {', '.join(SCORERS)}, or file.py:function for a function of yours. It takes a list of PIL images"
    )
    scorers += " and the list of their prompts, and returns a number for each. A higher number is better."
    add("--scorers", nargs="+", type=scorer_type, default=["pickscore", "clipscore"], help=scorers)
    add("--pickscore_model_name_or_path", default="yuvalkirstain/PickScore_v1")
    add("--pickscore_processor_name_or_path", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    add("--clipscore_model_name_or_path", default="openai/clip-vit-large-patch14")
    aesthetic = (
        "File sac+logos+ava1-l14-linearMSE.pth of LAION's aesthetic predictor, for --clipscore_model_name_or_path."
    )
    add("--aesthetic_weights", help=aesthetic)
    base = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    add("--hpsv2_base_name_or_path", default=base, help="CLIP whose configuration and tokenizer HPSv2 has.")
    weights = "File of {}. Default: it is downloaded from {}."
    add("--hpsv2_weights", help=weights.format("HPSv2, such as HPS_v2.1_compressed.pt", "xswu/HPSv2"))
    tokenizer = "Tokenizer that ImageReward has."
    add("--imagereward_tokenizer_name_or_path", default="google-bert/bert-base-uncased", help=tokenizer)
    add("--imagereward_weights", help=weights.format("ImageReward, ImageReward.pt", "THUDM/ImageReward"))


class CLIPSimilarity(torch.nn.Module):
    """Cosine of a CLIP's embeddings of prompt and picture, times `factor` or the model's own temperature."""

    def __init__(self, model, processor, factor=None):
        super().__init__()
        self.model = AutoModel.from_pretrained(model).eval()
        self.processor = AutoProcessor.from_pretrained(processor)
        self.factor = self.model.logit_scale.exp().item() if factor is None else factor
        digest = getattr(self.model.config, "_commit_hash", None) or digest_part(model)[:12]
        self.version = f"{model}@{digest}"

    def embed(self, prompts, images):
        """Unit vectors of prompts and of pictures, each of shape `(B, D)`."""
        inputs = self.processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device))
        return outputs.text_embeds, outputs.image_embeds

    def forward(self, prompts, images):
        return self.factor * torch.nn.functional.cosine_similarity(*self.embed(prompts, images))


def linear_layers(width):
    """The linear layers of LAION's aesthetic predictor and of ImageReward, by the numbers that they have in the files."""
    sizes = (width, 1024, 128, 64, 16, 1)
    linear = [torch.nn.Linear(*shape) for shape in zip(sizes, sizes[1:])]
    # There the first three are followed by dropout layers.
    dropouts = [torch.nn.Identity() for _ in range(3)]
    return torch.nn.Sequential(*itertools.chain(*zip(linear, dropouts)), *linear[3:])


class Aesthetic(CLIPSimilarity):
    """LAION's aesthetic predictor: linear layers on a picture's CLIP ViT-L/14 embedding. Scores are about 1 to 10."""

    def __init__(self, model, weights):
        super().__init__(model, model)
        self.head = linear_layers(self.model.config.projection_dim)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.head.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
        self.version = f"{Path(weights).name}@{digest_of_file(weights)[:12]}"

    def forward(self, prompts, images):
        _, pictures = self.embed(prompts, images)
        return self.head(pictures).flatten()


class OwnScorer(torch.nn.Module):
    """
    A function in a file of the user, `function(images, prompts)`, which returns a number for each picture. It is called with
    a list of RGB images and the list of their prompts.

    `version` has a digest of the file, not of other files that it imports.
    """

    def __init__(self, text):
        super().__init__()
        self.flag = f"--scorers {text}"
        file, _, function = text.rpartition(":")
        if not Path(file).is_file():
            raise ValueError(f"{self.flag}: there is no file {file}.")
        digest = digest_of_file(file)
        module = self.import_file(Path(file).resolve(), digest)
        self.function = getattr(module, function, None)
        if not callable(self.function):
            functions = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
            raise ValueError(
                f"{self.flag}: {file} has no function {function}. It has {', '.join(functions) or 'none'}."
            )
        self.version = f"{Path(file).name}:{function}@{digest[:12]}"

    def import_file(self, file, digest):
        """The module of a file, once for all of its functions. Its own folder is where it may import from, after others."""
        name = f"{file} {digest}"
        if name not in sys.modules:
            if str(file.parent) not in sys.path:
                sys.path.append(str(file.parent))
            spec = importlib.util.spec_from_file_location(name, file)
            # Dataclasses look for their module there.
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                del sys.modules[name]
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise ValueError(f"{self.flag}: {file} cannot be imported: {reason}") from error
        return sys.modules[name]

    def forward(self, prompts, images):
        try:
            values = self.function(images, prompts)
        except Exception as error:
            # Not a `ValueError`, which would be printed as one line, without where in the user's file it came from.
            raise RuntimeError(
                f"{self.flag} failed for {len(images)} images, the first of {prompts[0]!r:.80}"
            ) from error
        try:
            scores = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.flag} returned {values!r:.80}, but must return one number for each image: {one_line(error)}"
            ) from error
        if scores.shape != (len(images),):
            raise ValueError(
                f"{self.flag} returned scores of shape {tuple(scores.shape)} for {len(images)} images, but must return one "
                "number for each image."
            )
        return scores


def load_pickscore(args):
    return CLIPSimilarity(args.pickscore_model_name_or_path, args.pickscore_processor_name_or_path)


def load_clipscore(args):
    return CLIPSimilarity(args.clipscore_model_name_or_path, args.clipscore_model_name_or_path, factor=100)


def load_aesthetic(args):
    if args.aesthetic_weights is None:
        raise ValueError("--scorers aesthetic needs --aesthetic_weights, the file sac+logos+ava1-l14-linearMSE.pth.")
    return Aesthetic(args.clipscore_model_name_or_path, args.aesthetic_weights)


def load_hpsv2(args):
    from reward_models import HPSv2, find_weights

    weights = find_weights("hpsv2_weights", args.hpsv2_weights, "xswu/HPSv2", "HPS_v2.1_compressed.pt")
    return HPSv2(args.hpsv2_base_name_or_path, weights)


def load_imagereward(args):
    from reward_models import ImageReward, find_weights

    weights = find_weights("imagereward_weights", args.imagereward_weights, "THUDM/ImageReward", "ImageReward.pt")
    return ImageReward(args.imagereward_tokenizer_name_or_path, weights)


SCORERS = {
    "pickscore": load_pickscore,
    "clipscore": load_clipscore,
    "hpsv2": load_hpsv2,
    "imagereward": load_imagereward,
    "aesthetic": load_aesthetic,
}


def load_scorers(args):
    """The scorers of `--scorers`, `{name: scorer}`. A user's `judges.py:reward` has the name judges.reward."""
    scorers, texts = {}, {}
    for text in dict.fromkeys(args.scorers):
        file, _, function = text.rpartition(":")
        name = text if text in SCORERS else f"{Path(file).stem}.{function}"
        if texts.setdefault(name, text) != text:
            raise ValueError(f"--scorers {texts[name]} and {text} are both called {name}. Rename one of the files.")
        scorers[name] = SCORERS[text](args) if text in SCORERS else OwnScorer(text)
    return scorers


def check_scores(name, names, scores):
    """Raises a `ValueError` with the first of the pictures' `names` that has no finite score."""
    for picture, score in zip(names, scores):
        if not math.isfinite(score):
            raise ValueError(f"{picture}: --scorers {name} returned {score}, but a score must be finite.")


@torch.no_grad()
def score_pictures(accelerator, scorers, prompts, paths, description="Scoring"):
    """
    Scores of pictures of prompts, `{scorer: [score of each]}`, complete on every process. A `ValueError` names a picture
    without a finite score. Scorers run in fp32: half precision would decide close contests by rounding.
    """
    for scorer in scorers.values():
        scorer.to(accelerator.device)
    starts = range(0, len(paths), SCORING_BATCH_SIZE)[accelerator.process_index :: accelerator.num_processes]
    batches = [slice(start, start + SCORING_BATCH_SIZE) for start in starts]
    scored = []
    with ThreadPoolExecutor() as pool:
        next_images = pool.map(load_picture, paths[batches[0]]) if batches else []
        bar = tqdm(batches, desc=description, disable=not accelerator.is_local_main_process)
        for batch, next_batch in zip(bar, [*batches[1:], slice(0)]):
            # The next batch is decoded while this one is scored.
            images, next_images = list(next_images), pool.map(load_picture, paths[next_batch])
            scored.append((batch.start, [scorer(prompts[batch], images).tolist() for scorer in scorers.values()]))
    scored = [values for _, values in sorted(gather_object(scored))]
    scores = dict(zip(scorers, (list(itertools.chain(*values)) for values in zip(*scored))))
    for name, values in scores.items():
        check_scores(name, paths, values)
    return scores
