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
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from picture_records import load_picture
from tqdm.auto import tqdm


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
    pickscore, clip = "yuvalkirstain/PickScore_v1", "openai/clip-vit-large-patch14"
    add("--pickscore_model_name_or_path", default=pickscore, help="Hub id or folder of PickScore.")
    processor = "Hub id or folder of PickScore's tokenizer and image processor."
    add("--pickscore_processor_name_or_path", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help=processor)
    add(
        "--clipscore_model_name_or_path", default=clip, help="Hub id or folder of the CLIP of clipscore and aesthetic."
    )
    add("--aesthetic_weights", help="File sac+logos+ava1-l14-linearMSE.pth of LAION's aesthetic predictor.")
    base = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    add("--hpsv2_base_name_or_path", default=base, help="CLIP whose configuration and tokenizer HPSv2 has.")
    weights = "File of {}. Default: it is downloaded from {}."
    add("--hpsv2_weights", help=weights.format("HPSv2, such as HPS_v2.1_compressed.pt", "xswu/HPSv2"))
    tokenizer = "Tokenizer that ImageReward has."
    add("--imagereward_tokenizer_name_or_path", default="google-bert/bert-base-uncased", help=tokenizer)
    add("--imagereward_weights", help=weights.format("ImageReward, ImageReward.pt", "THUDM/ImageReward"))


def load_pickscore(args):
    from scorer_models import CLIPSimilarity

    return CLIPSimilarity(args.pickscore_model_name_or_path, args.pickscore_processor_name_or_path)


def load_clipscore(args):
    from scorer_models import CLIPSimilarity

    return CLIPSimilarity(args.clipscore_model_name_or_path, args.clipscore_model_name_or_path, factor=100)


def load_aesthetic(args):
    if args.aesthetic_weights is None:
        raise ValueError("it needs --aesthetic_weights, the file sac+logos+ava1-l14-linearMSE.pth.")
    from scorer_models import Aesthetic

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
    from scorer_models import OwnScorer

    scorers, texts = {}, {}
    for text in dict.fromkeys(args.scorers):
        file, _, function = text.rpartition(":")
        name = text if text in SCORERS else f"{Path(file).stem}.{function}"
        if texts.setdefault(name, text) != text:
            raise ValueError(f"--scorers {texts[name]} and {text} are both called {name}. Rename one of the files.")
        if text not in SCORERS:
            scorers[name] = OwnScorer(text)
            continue
        try:
            scorers[name] = SCORERS[text](args)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"--scorers {text} cannot be loaded: {error}") from error
    return scorers


def check_scores(name, names, scores):
    """Raises a `ValueError` with the first of the pictures' `names` that has no finite score."""
    for picture, score in zip(names, scores):
        if not math.isfinite(score):
            raise ValueError(f"{picture}: --scorers {name} returned {score}, but a score must be finite.")


def score_pictures(accelerator, scorers, prompts, paths, description="Scoring"):
    """
    Scores of pictures of prompts, `{scorer: [score of each]}`, complete on every process. A `ValueError` names a picture
    without a finite score. Scorers run in fp32: half precision would decide close contests by rounding.
    """
    import torch
    from accelerate.utils import gather_object

    for scorer in scorers.values():
        scorer.to(accelerator.device)
    starts = range(0, len(paths), SCORING_BATCH_SIZE)[accelerator.process_index :: accelerator.num_processes]
    batches = [slice(start, start + SCORING_BATCH_SIZE) for start in starts]
    scored = []
    with torch.no_grad(), ThreadPoolExecutor() as pool:
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
