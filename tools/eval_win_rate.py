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

    accelerate launch tools/eval_win_rate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
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
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import load_dataset
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from PIL import Image
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import check_min_version


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.42.0")

# The flags of both sides' model, its variant and revision, and LoRA.
SIDES = {
    "model": ("pretrained_model_name_or_path", "variant", "revision", "lora_weights"),
    "baseline": ("baseline_model_name_or_path", "baseline_variant", "baseline_revision", "baseline_lora_weights"),
}
# What pictures depend on beside them and the scheduler.
DRAWING_ARGUMENTS = ("seed", "num_inference_steps", "guidance_scale", "resolution", "mixed_precision")
SETTINGS_NAME = "settings.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
# Names of a component's weights, with or without a variant.
WEIGHTS = r"(?:diffusion_pytorch_|pytorch_)?model(?:-\d+-of-\d+)?(?:\.([^.-]+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
# The end of a LoRA layer's second matrix, as diffusers, peft and kohya name it.
LORA_UP = re.compile(r"[._]lora(?:_linear_layer|_embedding)?[._](?:up|B)\b")


def shorten(value):
    """A value as one line of at most 100 characters, for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def number_argument(kind, minimum):
    """A `type` for argparse: finite numbers from `minimum` on."""

    def number(text):
        if not minimum <= kind(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not at least {minimum}")
        return kind(text)

    return number


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_argument_group("the two sides")
    models.add_argument("--pretrained_model_name_or_path", type=str, required=True)
    models.add_argument("--variant", type=str, default=None, help="Of the model's files, for example fp16.")
    models.add_argument("--revision", type=str, default=None, help="Of the model on the hub.")
    models.add_argument("--lora_weights", type=str, default=None, help="A folder, .safetensors file or hub id.")
    models.add_argument("--baseline_model_name_or_path", type=str, default=None, help="Default: the same model.")
    for name in ("variant", "revision"):
        models.add_argument(f"--baseline_{name}", type=str, default=None, help="Default: the same of the same model.")
    models.add_argument("--baseline_lora_weights", type=str, default=None, help="Default: none.")

    prompts = parser.add_argument_group("prompts: one of the first three")
    prompts.add_argument("--prompts", type=str, nargs="+", default=None)
    prompts.add_argument("--prompts_file", type=str, default=None, help=".txt with one a line, .tsv, .csv or .parquet")
    prompts.add_argument("--dataset_name", type=str, default=None, help="Hub id or local folder.")
    prompts.add_argument("--dataset_config_name", type=str, default=None)
    prompts.add_argument("--dataset_split_name", type=str, default="train")
    prompts.add_argument("--prompt_column", type=str, default="caption")
    prompts.add_argument("--max_prompts", type=number_argument(int, 1), default=None)

    drawing = parser.add_argument_group("pictures")
    drawing.add_argument("--seed", type=number_argument(int, 0), default=0)
    drawing.add_argument("--scheduler", type=str, default=None, help="A class of diffusers. Default: the model's own.")
    drawing.add_argument("--num_inference_steps", type=number_argument(int, 1), default=50)
    drawing.add_argument("--guidance_scale", type=number_argument(float, 0), default=7.5)
    drawing.add_argument("--resolution", type=number_argument(int, 8), default=None, help="Default: the model's own.")
    drawing.add_argument("--batch_size", type=number_argument(int, 1), default=4, help="Changes no noise.")
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
    return parser.parse_args(input_args)


def load_prompts(args):
    """The prompts in order, or a `ValueError` that names what is wrong with their source."""
    given = [name for name in ("prompts", "prompts_file", "dataset_name") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"Give one of --prompts, --prompts_file and --dataset_name, not {len(given)} of them.")
    source = f"--{given[0]} {shorten(getattr(args, given[0]))}"
    found = []
    try:
        for place, prompt in itertools.islice(open_prompts(args), args.max_prompts):
            found.append((place, prompt))
    except Exception as error:
        where = f"after {found[-1][0]}: " if found else ""
        raise ValueError(f"{source} cannot be read: {where}{shorten(error)}") from error
    for place, prompt in found:
        if not isinstance(prompt, str) or not prompt.strip() or re.search("[\0\ud800-\udfff]", prompt):
            raise ValueError(
                f"{source}, {place}: {shorten(repr(prompt))} must be a prompt, in UTF-8. Mend or remove it."
            )
    if not found:
        raise ValueError(f"{source} holds no prompt.")
    return [prompt for _, prompt in found]


def open_prompts(args):
    """Yields the place and the value of every prompt."""
    suffix = Path(args.prompts_file or "").suffix.lower()
    if args.prompts is not None:
        yield from ((f"number {number}", prompt) for number, prompt in enumerate(args.prompts, start=1))
    elif suffix in (".txt", ".csv", ".tsv"):
        # What is not UTF-8 becomes surrogates, which no prompt may have.
        with open(args.prompts_file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
            if suffix == ".txt":
                yield from ((f"line {n}", line.rstrip("\r\n")) for n, line in enumerate(lines, 1) if line.strip())
                return
            # In a .tsv, quotation marks are the prompts' own.
            options = {"strict": True} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            table = csv.DictReader(lines, **options)
            check_column(args, table.fieldnames or [])
            for row in table:
                if None in row:
                    raise ValueError(f"line {table.line_num} has more cells than columns. Quote what holds commas.")
                yield f"line {table.line_num}", row[args.prompt_column]
    elif args.dataset_name is None and suffix != ".parquet":
        raise ValueError("it must end in .txt, .csv, .tsv or .parquet.")
    else:
        source = {"path": args.dataset_name, "name": args.dataset_config_name, "split": args.dataset_split_name}
        if args.dataset_name is None:
            source = {"path": "parquet", "data_files": args.prompts_file, "split": "train"}
        # Streaming, or else all splits would be downloaded, pictures included.
        dataset = load_dataset(**source, streaming=True)
        # Of a table in text a stream does not know the columns.
        check_column(args, dataset.column_names or list(next(iter(dataset), [])))
        rows = dataset.select_columns(args.prompt_column)
        yield from ((f"row {number}", row[args.prompt_column]) for number, row in enumerate(rows))


def check_column(args, columns):
    if args.prompt_column not in columns:
        raise ValueError(f"--prompt_column {args.prompt_column}: there are only {', '.join(columns)}.")


class Side(NamedTuple):
    """What draws one side's pictures: a model, the file of a LoRA or `None`, and the name of the scheduler's class."""

    model: str
    variant: str | None
    revision: str | None
    lora: Path | None
    scheduler: str


def open_side(args, side):
    """A `Side`, or a `ValueError` for what is wrong with it as far as that shows before its weights are loaded."""
    model, variant, revision, lora = (getattr(args, flag) for flag in SIDES[side])
    if model in (None, args.pretrained_model_name_or_path):
        model = args.pretrained_model_name_or_path
        variant, revision = variant or args.variant, revision or args.revision
    named = f"--{SIDES[side][0]} {model}"
    if Path(model).is_file():
        raise ValueError(
            f"{named} is a single file. Give the folder that StableDiffusionPipeline (or StableDiffusionXLPipeline)"
            f".from_single_file({model!r}).save_pretrained(folder) makes of it."
        )
    try:
        index = DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{named} is no pipeline's folder or hub id: {shorten(error)}") from error
    check_variant(named, SIDES[side][1], model, variant, revision, index)
    own = index.get("scheduler", [None, None])[1]
    if args.scheduler not in (None, own):
        names = sorted(scheduler.__name__ for scheduler in getattr(diffusers, own)().compatibles)
        # EDM's noise levels mean nothing to other models, nor theirs to EDM's.
        names = [name for name in names if name.startswith("EDM") == own.startswith("EDM")]
        if args.scheduler not in names:
            raise ValueError(f"--scheduler {shorten(args.scheduler)} does not suit {model}. Give {', '.join(names)}.")
    lora = None if lora is None else find_lora_file(f"--{SIDES[side][3]} {lora}", lora)
    return Side(model, variant, revision, lora, args.scheduler or own)


def check_variant(named, flag, model, variant, revision, index):
    """A `ValueError` unless all components have weights of the variant or, as pipelines fall back to, of none."""
    try:
        files = [file.relative_to(model).as_posix() for file in Path(model).glob("*/*")]
        files = files or list_repo_files(model, revision=revision)
    except Exception:
        # Without a connection, what is in the cache shows when it is loaded.
        return
    for component in index:
        matches = (re.fullmatch(f"{component}/{WEIGHTS}", file) for file in files)
        found = {match[1] for match in matches if match}
        if found and not found & {None, variant}:
            raise ValueError(f"{named}: {component} has only files of a variant. Give --{flag} {min(found)}.")


def find_lora_file(named, lora):
    """The file of a LoRA, which may be given by its folder or hub id."""
    path = Path(lora)
    if not path.exists():
        try:
            path = Path(snapshot_download(lora, allow_patterns="*.safetensors", ignore_patterns="*/*"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{named} exists neither here nor on the hub: {shorten(error)}") from error
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [file for file in files if file.name == LORA_NAME] or files
    if len(files) != 1:
        raise ValueError(f"{named} holds {len(files)} .safetensors files, none called {LORA_NAME}. Give one itself.")
    return files[0]


def digest_of_files(path):
    """
    Of what a local folder or file holds, since training may go on in the same place: LoRAs by content, models by sizes and
    times. A hub id holds nothing here.
    """
    path = Path(path)
    contents = [path.read_bytes()] if path.is_file() else []
    for file in sorted(path.rglob("*")):
        if file.is_file():
            contents.append(f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return hashlib.sha256(b"".join(contents)).hexdigest()


def save_settings(args, prompts, side, opened):
    """Keeps and returns what a side's pictures depend on; a `ValueError` if those that are there were drawn otherwise."""
    named = dict(zip(SIDES[side], (*opened[:3], getattr(args, SIDES[side][3]))))
    settings = {**named, "scheduler": opened.scheduler, **{name: getattr(args, name) for name in DRAWING_ARGUMENTS}}
    weights = {
        SIDES[side][0]: digest_of_files(opened.model),
        SIDES[side][3]: opened.lora and digest_of_files(opened.lora),
    }
    folder = picture_path(args, side, 0).parent
    file = folder / SETTINGS_NAME
    if any(folder.glob("*.png")):
        saved = json.loads(file.read_text(encoding="utf-8"))
        # More prompts may follow, those that were must stay.
        known = min(len(saved["prompts"]), len(prompts))
        changes = [
            f"--{name} is {settings[name]!r}, but was {saved.get(name)!r}"
            for name in settings
            if settings[name] != saved.get(name)
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
    file.write_text(json.dumps({**settings, "weights": weights, "prompts": prompts}, indent=2), encoding="utf-8")
    return settings


def picture_path(args, side, index):
    return Path(args.output_dir) / side / f"{index:05}.png"


def missing_pictures(args, side, prompts):
    return [index for index in range(len(prompts)) if not picture_path(args, side, index).is_file()]


def load_pipeline(args, side, opened):
    """A side's pipeline on the CPU, or a `ValueError` if it or its LoRA cannot be loaded whole."""
    model, variant, revision, lora, scheduler = opened
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, variant=variant, revision=revision, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        flags = f"--{SIDES[side][0]} {model}, --{SIDES[side][1]} {variant}"
        raise ValueError(f"{flags} cannot be loaded: {shorten(error)}") from error
    if hasattr(pipeline, "safety_checker"):
        # A blackened picture would lose.
        pipeline.safety_checker = None
    if args.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    if lora is not None:
        load_lora(pipeline, f"--{SIDES[side][3]} {lora}", lora)
    return pipeline


def load_lora(pipeline, named, file):
    """Adds a LoRA to a pipeline, which by itself passes over layers that it does not have; here they are a `ValueError`."""
    try:
        with safe_open(file, "pt") as tensors:
            layers = [LORA_UP.split(name)[0] for name in tensors.keys() if LORA_UP.search(name)]
        # Without the file's name, older versions of diffusers ask the hub.
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except Exception as error:
        raise ValueError(f"{named} does not fit {type(pipeline).__name__}: {shorten(error)}") from error
    fitting = {
        f"{component}.{name}"
        for component, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        for name, module in part.named_modules()
        if hasattr(module, "lora_B") and not any(weight.is_meta for weight in module.parameters())
    }
    if len(fitting) < max(len(layers), 1):
        stranger = shorten(next((layer for layer in layers if layer not in fitting), None))
        raise ValueError(
            f"{named}: {len(fitting)} of its {len(layers)} layers fit the model, not {stranger}. Give a LoRA of this model,"
            f" in the format of {type(pipeline).__name__}.save_lora_weights."
        )


def draw_side(args, accelerator, side, opened, prompts):
    """Draws this process's share of a side's pictures that are missing, each from the noise of its own prompt."""
    missing = missing_pictures(args, side, prompts)
    # No process draws before all have seen what is missing.
    accelerator.wait_for_everyone()
    missing = missing[accelerator.process_index :: accelerator.num_processes]
    if not missing:
        return
    pipeline = load_pipeline(args, side, opened).to(accelerator.device)
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


class CLIPSimilarity(torch.nn.Module):
    """Cosine of a CLIP's embeddings of prompt and picture, times a constant or the model's own temperature."""

    def __init__(self, model, processor, factor=None):
        super().__init__()
        self.model = AutoModel.from_pretrained(model).eval()
        self.processor = AutoProcessor.from_pretrained(processor)
        self.factor = self.model.logit_scale.exp().item() if factor is None else factor

    def embed(self, prompt, image):
        """Unit vectors of shape `(1, D)`: of the prompt, of the picture."""
        inputs = self.processor(text=[prompt], images=[image], padding=True, truncation=True, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device))
        return outputs.text_embeds, outputs.image_embeds

    def forward(self, prompt, path):
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

    def forward(self, prompt, path):
        _, picture = self.embed(prompt, load_picture(path))
        return self.head(picture).item()


class HPSv2(torch.nn.Module):
    """HPSv2.1 with the model of its package, whose own `score` would load the weights anew for every picture."""

    def __init__(self):
        super().__init__()
        from hpsv2 import img_score
        from hpsv2.src.open_clip import get_tokenizer

        img_score.device = "cpu"
        img_score.initialize_model()
        self.model, self.preprocess = (img_score.model_dict[name] for name in ("model", "preprocess_val"))
        weights = torch.load(hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt"), map_location="cpu")
        self.model.load_state_dict(weights["state_dict"])
        self.model.eval()
        self.tokenizer = get_tokenizer("ViT-H-14")

    def forward(self, prompt, path):
        device = next(self.model.parameters()).device
        image = self.preprocess(load_picture(path))[None].to(device)
        outputs = self.model(image, self.tokenizer([prompt]).to(device))
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
    medians = statistics.median(scores), statistics.median(baseline_scores)
    return Comparison(*medians, rate, center - half_width, center + half_width, min(1.0, 2 * tail))


def write_csv(args, prompts, scores):
    with open(Path(args.output_dir) / "scores.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt", *(f"{name}_{side}" for name in scores for side in SIDES)])
        for index, prompt in enumerate(prompts):
            writer.writerow([index, prompt, *(scores[name][side][index] for name in scores for side in SIDES)])


def summarize(args, prompts, scores, settings):
    """Two Markdown tables: of every scorer's `Comparison`, and of both sides' settings."""
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
    lines += ["", "| drawn with | model | baseline |", "|---|---|---|"]
    for name, *values in zip(settings["model"], *(settings[side].values() for side in SIDES)):
        if name == "resolution":
            values = ["{} x {}".format(*load_picture(picture_path(args, side, 0)).size) for side in SIDES]
        lines.append(f"| {name} | {values[0]} | {values[1]} |")
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
    (Path(args.output_dir) / "index.html").write_text(page, encoding="utf-8")


def main(args):
    accelerator = Accelerator()
    prompts = load_prompts(args)
    opened = {side: open_side(args, side) for side in SIDES}
    # Whether they are there is known before anything is drawn; the accelerator is the pipelines' until all is.
    scorers = {name: SCORERS[name](args) for name in args.scorers}
    if accelerator.is_main_process:
        settings = {side: save_settings(args, prompts, side, opened[side]) for side in SIDES}
    for side in SIDES:
        if missing_pictures(args, side, prompts):
            # That both can be loaded is known before either draws, one at a time to save memory.
            load_pipeline(args, side, opened[side])
    for side in SIDES:
        draw_side(args, accelerator, side, opened[side], prompts)
    accelerator.wait_for_everyone()
    scores = score_pictures(args, accelerator, prompts, scorers)
    if accelerator.is_main_process:
        write_csv(args, prompts, scores)
        write_page(args, prompts, scores)
        summary = summarize(args, prompts, scores, settings)
        (Path(args.output_dir) / "summary.md").write_text(summary, encoding="utf-8")
        print(summary)
    accelerator.end_training()


if __name__ == "__main__":
    # A code page prints what it can.
    sys.stdout.reconfigure(errors="replace")
    main(parse_args())
