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

"""What `eval_win_rate.py` and `collect_preferences.py` share: reading prompts, drawing pictures of them and scoring these."""

import argparse
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import load_dataset
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import check_min_version


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_ncp_dpo_sd15 import read_image  # noqa: E402


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.42.0")

SETTINGS_NAME = "settings.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
# Names of a component's weights, with or without a variant.
WEIGHTS = r"(?:diffusion_pytorch_|pytorch_)?model(?:-\d+-of-\d+)?(?:\.([^.-]+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
# The end of a LoRA layer's second matrix, as diffusers, peft and kohya name it.
LORA_UP = re.compile(r"[._]lora(?:_linear_layer|_embedding)?[._](?:up|B)\b")
# Pictures of a batch, which all scorers see at once.
SCORING_BATCH_SIZE = 16


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


def add_prompt_arguments(parser):
    prompts = parser.add_argument_group("prompts: one of the first three")
    prompts.add_argument("--prompts", type=str, nargs="+", default=None)
    prompts.add_argument("--prompts_file", type=str, default=None, help=".txt with one a line, .tsv, .csv or .parquet")
    prompts.add_argument("--dataset_name", type=str, default=None, help="Hub id or local folder.")
    prompts.add_argument("--dataset_config_name", type=str, default=None)
    prompts.add_argument("--dataset_split_name", type=str, default="train")
    prompts.add_argument("--prompt_column", type=str, default="caption")
    prompts.add_argument("--max_prompts", type=number_argument(int, 1), default=None)


def add_drawing_arguments(parser, several=False):
    """With `several`, steps and guidance are lists."""
    drawing = parser.add_argument_group("pictures")
    drawing.add_argument("--seed", type=number_argument(int, 0), default=0)
    drawing.add_argument("--scheduler", type=str, default=None, help="A class of diffusers. Default: the model's own.")
    for name, kind, minimum, default in (("num_inference_steps", int, 1, 50), ("guidance_scale", float, 0, 7.5)):
        options = {"nargs": "+", "default": [default]} if several else {"default": default}
        drawing.add_argument(f"--{name}", type=number_argument(kind, minimum), **options)
    drawing.add_argument("--resolution", type=number_argument(int, 8), default=None, help="Default: the model's own.")
    drawing.add_argument("--batch_size", type=number_argument(int, 1), default=4, help="Changes no noise.")
    drawing.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default=None,
        help="Default: fp16 on a GPU, no on the CPU.",
    )


def add_scorer_arguments(parser):
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


class Source(NamedTuple):
    """
    What draws pictures: a model, the files of its LoRAs, all at weight 1, and the name of the scheduler's class; and the flags
    that model, variant and LoRAs were given by.
    """

    model: str
    variant: str | None
    revision: str | None
    loras: tuple
    scheduler: str
    flags: tuple

    def digest_of_loras(self):
        """The LoRAs' digests, joined as their names are, or `None` without any."""
        return "+".join(map(digest_of_files, self.loras)) or None


class Picture(NamedTuple):
    """A picture to draw: where it will be, and what it depends on beside the arguments that all of them share."""

    path: Path
    prompt: str
    source: Source
    seed: int
    num_inference_steps: int
    guidance_scale: float


def open_source(args, flags, model, variant, revision, lora):
    """
    A `Source`, or a `ValueError` for what is wrong with it as far as that shows before its weights are loaded; `flags` are
    the names of those of model, variant and LoRA, which may be several joined by +.
    """
    named = f"--{flags[0]} {model}"
    if Path(model).is_file():
        raise ValueError(
            f"{named} is a single file. Give the folder that StableDiffusionPipeline (or StableDiffusionXLPipeline)"
            f".from_single_file({model!r}).save_pretrained(folder) makes of it."
        )
    try:
        index = DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{named} is no pipeline's folder or hub id: {shorten(error)}") from error
    check_variant(named, flags[1], model, variant, revision, index)
    own = index.get("scheduler", [None, None])[1]
    if args.scheduler not in (None, own):
        names = sorted(scheduler.__name__ for scheduler in getattr(diffusers, own)().compatibles)
        # EDM's noise levels mean nothing to other models, nor theirs to EDM's.
        names = [name for name in names if name.startswith("EDM") == own.startswith("EDM")]
        if args.scheduler not in names:
            raise ValueError(f"--scheduler {shorten(args.scheduler)} does not suit {model}. Give {', '.join(names)}.")
    names = [lora] if lora is None or Path(lora).exists() else lora.split("+")
    loras = tuple(find_lora_file(f"--{flags[2]} {name}", name) for name in names if name is not None)
    return Source(model, variant, revision, loras, args.scheduler or own, flags)


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


def save_settings(folder, settings, weights, prompts):
    """
    Keeps what the pictures of a folder depend on: settings and digests of weights by flag, and prompts. Returns all its
    prompts; a `ValueError` if the pictures that are there were drawn otherwise.
    """
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
    return prompts


def choose_precision(args, accelerator):
    """`--mixed_precision` or its default: drawing in half precision is twice as fast, except on the CPU."""
    return args.mixed_precision or ("no" if accelerator.device.type == "cpu" else "fp16")


def load_pipeline(args, source):
    """A source's pipeline on the CPU, or a `ValueError` if it or its LoRAs cannot be loaded whole."""
    model, variant, revision, loras, scheduler, flags = source
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, variant=variant, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        named = f"--{flags[0]} {model}, --{flags[1]} {variant}"
        raise ValueError(f"{named} cannot be loaded: {shorten(error)}") from error
    if hasattr(pipeline, "safety_checker"):
        # A blackened picture would lose.
        pipeline.safety_checker = None
    if args.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    for number, lora in enumerate(loras):
        load_lora(pipeline, f"--{flags[2]} {lora}", lora, f"lora_{number}")
    if loras:
        pipeline.set_adapters([f"lora_{number}" for number in range(len(loras))])
    return pipeline


def load_lora(pipeline, named, file, adapter_name):
    """Adds a LoRA to a pipeline, which by itself passes over layers that it does not have; here they are a `ValueError`."""
    try:
        with safe_open(file, "pt") as tensors:
            layers = [LORA_UP.split(name)[0] for name in tensors.keys() if LORA_UP.search(name)]
        # Without the file's name, older versions of diffusers ask the hub.
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=adapter_name)
    except Exception as error:
        raise ValueError(f"{named} does not fit {type(pipeline).__name__}: {shorten(error)}") from error
    fitting = {
        f"{component}.{name}"
        for component, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        for name, module in part.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
        if not any(weight.is_meta for weight in module.parameters())
    }
    if len(fitting) < max(len(layers), 1):
        stranger = shorten(next((layer for layer in layers if layer not in fitting), None))
        raise ValueError(
            f"{named}: {len(fitting)} of its {len(layers)} layers fit the model, not {stranger}. Give a LoRA of this model,"
            f" in the format of {type(pipeline).__name__}.save_lora_weights."
        )


def draw_pictures(args, accelerator, pictures):
    """Draws this process's share of the pictures that are missing, each from the noise of its own seed."""

    def settings(picture):
        return picture.source, picture.num_inference_steps, picture.guidance_scale

    alike = list(dict.fromkeys(map(settings, pictures)))
    missing = sorted(
        (picture for picture in pictures if not picture.path.is_file()),
        key=lambda picture: alike.index(settings(picture)),
    )
    # No process draws before all have seen what is missing.
    accelerator.wait_for_everyone()
    missing = missing[accelerator.process_index :: accelerator.num_processes]
    if not missing:
        return
    sources = dict.fromkeys(picture.source for picture in missing)
    for source in sources if len(sources) > 1 else ():
        # That all can be loaded is known before any draws, one at a time to save memory.
        load_pipeline(args, source)
    progress = tqdm(total=len(missing), desc="Drawing", disable=not accelerator.is_local_main_process)
    for source, pictures_of_source in itertools.groupby(missing, lambda picture: picture.source):
        pipeline = load_pipeline(args, source).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        for (_, num_inference_steps, guidance_scale), group in itertools.groupby(pictures_of_source, settings):
            while batch := list(itertools.islice(group, args.batch_size)):
                images = pipeline(
                    [picture.prompt for picture in batch],
                    height=args.resolution,
                    width=args.resolution,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    generator=[torch.Generator().manual_seed(picture.seed) for picture in batch],
                ).images
                for picture, image in zip(batch, images):
                    save_picture(image, picture.path)
                progress.update(len(batch))
        # Before the next is loaded.
        del pipeline
    progress.close()


def save_picture(image, path):
    incomplete = path.with_suffix(".incomplete")
    try:
        image.save(incomplete, "PNG")
        incomplete.rename(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}. Pictures that are there are not drawn again.") from error


def load_picture(path):
    try:
        return read_image(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove it to have it drawn again.") from error


class CLIPSimilarity(torch.nn.Module):
    """Cosine of a CLIP's embeddings of prompt and picture, times a constant or the model's own temperature."""

    def __init__(self, model, processor, factor=None):
        super().__init__()
        self.model = AutoModel.from_pretrained(model).eval()
        self.processor = AutoProcessor.from_pretrained(processor)
        self.factor = self.model.logit_scale.exp().item() if factor is None else factor
        self.version = "@".join(filter(None, [str(model), getattr(self.model.config, "_commit_hash", None)]))

    def embed(self, prompts, images):
        """Unit vectors of shape `(B, D)`: of the prompts, of the pictures."""
        inputs = self.processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device))
        return outputs.text_embeds, outputs.image_embeds

    def forward(self, prompts, images):
        return self.factor * torch.nn.functional.cosine_similarity(*self.embed(prompts, images))


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
        self.version = f"{Path(weights).name}@{digest_of_files(weights)[:12]}"

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
    Scores of pictures of prompts, `{scorer: [score of each]}`, complete on every process. Scorers stay in fp32, which costs
    a hundredth of drawing: half precision would decide close contests by rounding.
    """
    for scorer in scorers.values():
        scorer.to(accelerator.device)
    scores = torch.zeros(len(scorers), len(paths), device=accelerator.device)
    starts = range(0, len(paths), SCORING_BATCH_SIZE)[accelerator.process_index :: accelerator.num_processes]
    batches = [slice(start, start + SCORING_BATCH_SIZE) for start in starts]
    with ThreadPoolExecutor() as pool:
        following = pool.map(load_picture, paths[batches[0]]) if batches else []
        bar = tqdm(batches, desc=description, disable=not accelerator.is_local_main_process)
        for batch, next_batch in zip(bar, [*batches[1:], slice(0)]):
            # The next batch is decoded while this is scored, each once for all scorers.
            images, following = list(following), pool.map(load_picture, paths[next_batch])
            for number, (name, scorer) in enumerate(scorers.items()):
                scores[number, batch] = scorer(prompts[batch], images).float()
    scores = accelerator.reduce(scores).tolist()
    for name, values in zip(scorers, scores):
        for path, score in zip(paths, values):
            if not math.isfinite(score):
                raise ValueError(f"{path}: its {name} is {score}.")
    return dict(zip(scorers, scores))
