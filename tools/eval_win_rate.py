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


"""How often pictures of one Stable Diffusion beat another's, drawn for the same prompts from the same noise.

    accelerate launch eval_win_rate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --lora_weights ncp-dpo-sd15 --prompts_file PartiPrompts.tsv --prompt_column Prompt --scorers pickscore clipscore \
      --output_dir parti

holds a LoRA against its base model. `--baseline_model_name_or_path` and `--baseline_lora_weights` name another opponent; one of
another native resolution has the same noise only if `--resolution` is given. Writes all pictures, `scores.csv`, `summary.md`
and `index.html`, a page of both sides sorted by how much one won. Pictures that are there already are not drawn again: to
replace one side, remove its folder.
"""

import argparse
import csv
import hashlib
import html
import importlib.util
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from diffusers import DiffusionPipeline
from diffusers.utils import check_min_version


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.35.0")

# The flags of both sides' model and LoRA.
SIDES = {
    "model": ("pretrained_model_name_or_path", "lora_weights"),
    "baseline": ("baseline_model_name_or_path", "baseline_lora_weights"),
}
# What pictures depend on beside them.
DRAWING_ARGUMENTS = ("seed", "num_inference_steps", "guidance_scale", "resolution", "mixed_precision")
SETTINGS_NAME = "settings.json"


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_argument_group("the two sides")
    models.add_argument("--pretrained_model_name_or_path", type=str, required=True)
    models.add_argument("--lora_weights", type=str, default=None, help="LoRA of the model: a folder or a hub id.")
    models.add_argument("--baseline_model_name_or_path", type=str, default=None, help="Default: the same model.")
    models.add_argument("--baseline_lora_weights", type=str, default=None, help="Default: none.")

    prompts = parser.add_argument_group("prompts: one of the first three")
    prompts.add_argument("--prompts", type=str, nargs="+", default=None)
    prompts.add_argument("--prompts_file", type=str, default=None, help=".txt with one a line, .tsv, .csv or .parquet")
    prompts.add_argument("--dataset_name", type=str, default=None, help="Hub id or local folder.")
    prompts.add_argument("--dataset_config_name", type=str, default=None)
    prompts.add_argument("--dataset_split_name", type=str, default="train")
    prompts.add_argument("--prompt_column", type=str, default="caption")
    prompts.add_argument("--max_prompts", type=int, default=None)

    drawing = parser.add_argument_group("pictures")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--num_inference_steps", type=int, default=50)
    drawing.add_argument("--guidance_scale", type=float, default=7.5)
    drawing.add_argument("--resolution", type=int, default=None, help="Default: the model's own.")
    drawing.add_argument("--batch_size", type=int, default=4, help="Prompts at a time; changes no noise.")
    drawing.add_argument("--mixed_precision", type=str, default="no", choices=["no", "fp16", "bf16"])

    scoring = parser.add_argument_group("scores")
    scoring.add_argument("--scorers", type=str, nargs="+", default=["pickscore", "clipscore"], choices=list(SCORERS))
    scoring.add_argument("--pickscore_model_name_or_path", type=str, default="yuvalkirstain/PickScore_v1")
    scoring.add_argument(
        "--pickscore_processor_name_or_path", type=str, default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    )
    scoring.add_argument("--clipscore_model_name_or_path", type=str, default="openai/clip-vit-large-patch14")
    scoring.add_argument(
        "--aesthetic_weights",
        type=str,
        default=None,
        help="The head of LAION's aesthetic predictor, sac+logos+ava1-l14-linearMSE.pth, over --clipscore_model_name_or_path.",
    )
    scoring.add_argument("--output_dir", type=str, default="win-rate")
    args = parser.parse_args(input_args)
    for flag in ("max_prompts", "batch_size", "num_inference_steps", "resolution"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} is {getattr(args, flag)}, but must be at least 1.")
    return args


def load_prompts(args):
    """The prompts in order, or a `ValueError` that names what is wrong with their source."""
    sources = {name: getattr(args, name) for name in ("prompts", "prompts_file", "dataset_name")}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"Give one of --prompts, --prompts_file and --dataset_name, not {len(given)} of them.")
    if args.prompts is not None:
        prompts = args.prompts
    elif args.prompts_file is not None and args.prompts_file.endswith(".txt"):
        prompts = [line for line in Path(args.prompts_file).read_text().splitlines() if line.strip()]
    else:
        prompts = load_prompt_column(args)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Row {row}: the prompt is {prompt!r}, but must be a text.")
    if not prompts:
        raise ValueError(f"--{given[0]} {sources[given[0]]} holds no prompt.")
    return prompts[: args.max_prompts]


def load_prompt_column(args):
    if args.dataset_name is not None:
        # Or else all splits would be downloaded, pictures included.
        dataset = load_dataset(
            args.dataset_name, args.dataset_config_name, split=args.dataset_split_name, streaming=True
        )
    else:
        # Tabs part the columns of a .tsv, quotation marks are the prompts' own.
        loaders = {
            ".csv": ("csv", {}),
            ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
            ".parquet": ("parquet", {}),
        }
        suffix = Path(args.prompts_file).suffix
        if suffix not in loaders:
            raise ValueError(f"--prompts_file {args.prompts_file} must end in .txt, .csv, .tsv or .parquet.")
        loader, options = loaders[suffix]
        dataset = load_dataset(loader, data_files=args.prompts_file, split="train", streaming=True, **options)
    # Of a table in text a stream does not know the columns.
    columns = dataset.column_names or list(next(iter(dataset), []))
    if args.prompt_column not in columns:
        raise ValueError(f"--prompt_column {args.prompt_column}: there are only {', '.join(columns)}.")
    rows = dataset.select_columns(args.prompt_column)
    return [row[args.prompt_column] for row in itertools.islice(rows, args.max_prompts)]


def digest_of_files(path):
    """
    Of what a local folder or file holds, since training may go on in the same place: LoRAs by content, models by sizes and
    times. A hub id holds nothing here.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        contents = [
            f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}".encode()
            for file in sorted(path.rglob("*"))
            if file.is_file()
        ]
    else:
        contents = [file.read_bytes() for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def side_models(args, side):
    """A side's model and LoRA, which may be `None`."""
    model, lora = (getattr(args, flag) for flag in SIDES[side])
    return model or args.pretrained_model_name_or_path, lora


def check_settings(args, prompts, side):
    """Keeps with a side's pictures what they depend on; a `ValueError` if those that are there were drawn otherwise."""
    named = dict(zip(SIDES[side], side_models(args, side)))
    settings = {**named, **{name: getattr(args, name) for name in DRAWING_ARGUMENTS}}
    weights = {name: value and digest_of_files(value) for name, value in named.items()}
    folder = picture_path(args, side, 0).parent
    file = folder / SETTINGS_NAME
    if any(folder.glob("*.png")):
        saved = json.loads(file.read_text())
        # More prompts may follow, those that were must stay.
        known = min(len(saved["prompts"]), len(prompts))
        changes = [
            f"--{name} is {settings[name]!r}, but was {saved[name]!r}"
            for name in settings
            if settings[name] != saved[name]
        ]
        changes += [f"--{name} holds other weights" for name in weights if weights[name] != saved["weights"][name]]
        if saved["prompts"][:known] != prompts[:known]:
            changes.append("the prompts are others")
        if changes:
            raise ValueError(
                f"{'; '.join(changes)} for the pictures in {folder}. Remove them, or give another --output_dir."
            )
        prompts = max(prompts, saved["prompts"], key=len)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**settings, "weights": weights, "prompts": prompts}, indent=2))


def picture_path(args, side, index):
    return Path(args.output_dir) / side / f"{index:05}.png"


def draw_side(args, accelerator, side, prompts):
    """Draws this process's share of a side's pictures that are missing, each from the noise of its own prompt."""
    missing = [index for index in range(len(prompts)) if not picture_path(args, side, index).is_file()]
    # No process draws before all have seen what is missing.
    accelerator.wait_for_everyone()
    missing = missing[accelerator.process_index :: accelerator.num_processes]
    if not missing:
        return
    model, lora = side_models(args, side)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(accelerator.device)
    if hasattr(pipeline, "safety_checker"):
        # A blackened picture would lose.
        pipeline.safety_checker = None
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    batches = [missing[start : start + args.batch_size] for start in range(0, len(missing), args.batch_size)]
    for batch in tqdm(batches, desc=f"Drawing: {side}", disable=not accelerator.is_local_main_process):
        images = pipeline(
            [prompts[index] for index in batch],
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + index) for index in batch],
        ).images
        for index, image in zip(batch, images):
            path = picture_path(args, side, index)
            incomplete = path.with_suffix(".incomplete")
            image.save(incomplete, "PNG")
            incomplete.rename(path)


def load_picture(path):
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove it to have it drawn again.") from error


class CLIPSimilarity:
    """Cosine of a CLIP's embeddings of prompt and picture, times a constant or the model's own temperature."""

    def __init__(self, model, processor, factor=None):
        self.model = AutoModel.from_pretrained(model).eval()
        self.processor = AutoProcessor.from_pretrained(processor)
        self.device = torch.device("cpu")
        self.factor = self.model.logit_scale.exp().item() if factor is None else factor

    def embed(self, prompt, image):
        """Unit vectors of shape `(1, D)`: of the prompt, of the picture."""
        inputs = self.processor(text=[prompt], images=[image], padding=True, truncation=True, return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        return outputs.text_embeds, outputs.image_embeds

    def to(self, device):
        self.model.to(device)
        self.device = device

    def __call__(self, prompt, path):
        text, picture = self.embed(prompt, load_picture(path))
        return self.factor * torch.nn.functional.cosine_similarity(text, picture).item()


class Aesthetic(CLIPSimilarity):
    """LAION's aesthetic predictor: a multi-layer perceptron without activations over CLIP ViT-L/14, about 1 to 10."""

    def __init__(self, model, weights):
        super().__init__(model, model)
        sizes = (self.model.config.projection_dim, 1024, 128, 64, 16, 1)
        linear = [torch.nn.Linear(*shape) for shape in zip(sizes, sizes[1:])]
        # The weights are numbered with the dropout between them.
        self.head = torch.nn.Sequential(
            *(layer for pair in zip(linear[:3], 3 * [torch.nn.Identity()]) for layer in pair), *linear[3:]
        )
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.head.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})

    def to(self, device):
        super().to(device)
        self.head.to(device)

    def __call__(self, prompt, path):
        _, picture = self.embed(prompt, load_picture(path))
        return self.head(picture).item()


class HPSv2:
    """HPSv2.1 with the model of its package, whose own `score` would load the weights anew for every picture."""

    def __init__(self):
        from hpsv2 import img_score
        from hpsv2.src.open_clip import get_tokenizer

        img_score.device = "cpu"
        img_score.initialize_model()
        self.model, self.preprocess = (img_score.model_dict[name] for name in ("model", "preprocess_val"))
        weights = torch.load(hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt"), map_location="cpu")
        self.model.load_state_dict(weights["state_dict"])
        self.model.eval()
        self.tokenizer = get_tokenizer("ViT-H-14")

    def to(self, device):
        self.model.to(device)
        self.device = device

    def __call__(self, prompt, path):
        image = self.preprocess(load_picture(path))[None].to(self.device)
        outputs = self.model(image, self.tokenizer([prompt]).to(self.device))
        return torch.linalg.vecdot(outputs["image_features"], outputs["text_features"]).item()


class ImageReward:
    def __init__(self):
        import ImageReward as package

        self.model = package.load("ImageReward-v1.0", device="cpu")

    def to(self, device):
        self.model.to(device)
        self.model.device = device

    def __call__(self, prompt, path):
        # By its path: not all versions take pictures.
        return self.model.score(prompt, str(path))


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
def score_pictures(args, accelerator, prompts, scorers):
    """Scores of every picture, `{scorer: {side: [score of each prompt]}}`, complete on every process."""
    share = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    for scorer in scorers.values():
        scorer.to(accelerator.device)
    scores = torch.zeros(len(scorers), len(SIDES), len(prompts), device=accelerator.device)
    for index in tqdm(share, desc="Scoring", disable=not accelerator.is_local_main_process):
        for side_number, side in enumerate(SIDES):
            path = picture_path(args, side, index)
            for number, (name, scorer) in enumerate(scorers.items()):
                score = scorer(prompts[index], path)
                if not math.isfinite(score):
                    raise ValueError(f"{path}: its {name} is {score}.")
                scores[number, side_number, index] = score
    scores = accelerator.reduce(scores).tolist()
    return {name: dict(zip(SIDES, values)) for name, values in zip(scorers, scores)}


class Comparison(NamedTuple):
    """
    Of one scorer: both medians; the share of prompts that the model wins, ties counting half, with its 95 % confidence
    interval (Wilson 1927); and the two-sided p-value of the sign test, ties left out.
    """

    median: float
    baseline_median: float
    win_rate: float
    low: float
    high: float
    p_value: float


def compare(scores, baseline_scores):
    """The `Comparison` of two lists of scores of the same prompts."""
    n = len(scores)
    wins = sum(ours > theirs for ours, theirs in zip(scores, baseline_scores, strict=True))
    losses = sum(ours < theirs for ours, theirs in zip(scores, baseline_scores, strict=True))
    rate = (wins + 0.5 * (n - wins - losses)) / n
    z = statistics.NormalDist().inv_cdf(0.975)
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    decided = wins + losses
    tail = sum(math.comb(decided, k) for k in range(min(wins, losses) + 1)) / 2**decided
    return Comparison(
        statistics.median(scores),
        statistics.median(baseline_scores),
        rate,
        center - half_width,
        center + half_width,
        min(1.0, 2 * tail),
    )


def write_csv(args, prompts, scores):
    with open(Path(args.output_dir) / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt", *(f"{name}_{side}" for name in scores for side in SIDES)])
        for index, prompt in enumerate(prompts):
            writer.writerow([index, prompt, *(scores[name][side][index] for name in scores for side in SIDES)])


def summarize(prompts, scores):
    """A Markdown table of every scorer's `Comparison`."""
    lines = [
        f"| {len(prompts)} prompts | median, model | median, baseline | win rate | 95 % | sign test, p |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in scores.items():
        c = compare(values["model"], values["baseline"])
        lines.append(
            f"| {name} | {c.median:.4g} | {c.baseline_median:.4g} | {c.win_rate:.1%} | {c.low:.1%} – {c.high:.1%} |"
            f" {c.p_value:.2g} |"
        )
    return "\n".join(lines) + "\n"


def write_page(args, prompts, scores):
    """`index.html`: both pictures of every prompt, where the model won by most first, in the eyes of the first scorer."""
    name, values = next(iter(scores.items()))
    margins = [ours - theirs for ours, theirs in zip(values["model"], values["baseline"])]
    rows = []
    for index in sorted(range(len(prompts)), key=lambda index: -margins[index]):
        cells = "".join(
            f'<td><img src="{side}/{index:05}.png" loading="lazy"><br>'
            + ", ".join(f"{scorer} {scores[scorer][side][index]:.4g}" for scorer in scores)
            + "</td>"
            for side in SIDES
        )
        rows.append(f"<tr><td>{html.escape(prompts[index])}<br>{margins[index]:+.4g}</td>{cells}</tr>")
    page = (
        '<!doctype html><meta charset="utf-8"><title>Win rate</title>'
        "<style>body{font-family:sans-serif}img{max-width:384px}td{vertical-align:top;padding:6px}</style>"
        f"<p>Sorted by how much the model won, in the eyes of {name}</p>"
        f"<table><tr><th>prompt</th><th>model</th><th>baseline</th></tr>{''.join(rows)}</table>"
    )
    (Path(args.output_dir) / "index.html").write_text(page)


def main(args):
    accelerator = Accelerator()
    prompts = load_prompts(args)
    # Whether they are there is known before anything is drawn; the accelerator is the pipelines' until all is.
    scorers = {name: SCORERS[name](args) for name in args.scorers}
    if accelerator.is_main_process:
        for side in SIDES:
            check_settings(args, prompts, side)
    for side in SIDES:
        draw_side(args, accelerator, side, prompts)
    accelerator.wait_for_everyone()
    scores = score_pictures(args, accelerator, prompts, scorers)
    if accelerator.is_main_process:
        write_csv(args, prompts, scores)
        write_page(args, prompts, scores)
        summary = summarize(prompts, scores)
        (Path(args.output_dir) / "summary.md").write_text(summary)
        print(summary)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
