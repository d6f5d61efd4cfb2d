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

"""What `eval_win_rate.py` and `collect_preferences.py` share: reading prompts and drawing pictures of them."""

import csv
import itertools
import json
import re
from collections import defaultdict, deque
from pathlib import Path
from typing import NamedTuple

from common import COUNT, NOT_NEGATIVE, number_type, whole_file
from datasets import load_dataset
from huggingface_hub import list_repo_files, snapshot_download
from picture_records import RECORD_NAME, digest_of_file
from tqdm.auto import tqdm


# torch, peft, diffusers and preference_pairs are imported late: they take seconds to load.
SETTINGS_NAME = "settings.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
# Names of a component's weights, with or without a variant.
WEIGHTS = r"(?:diffusion_pytorch_|pytorch_)?model(?:-\d+-of-\d+)?(?:\.([^.-]+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
# The end of the name of a LoRA layer's second matrix in the formats of diffusers, peft and kohya.
LORA_UP = re.compile(r"[._]lora(?:_linear_layer|_embedding)?[._](?:up|B)\b")
LORA_DOWN = re.compile(LORA_UP.pattern.replace("up|B", "down|A"))
SEED = number_type(int, "from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
RESOLUTION = number_type(int, "a multiple of 8", lambda value: value >= 8 and value % 8 == 0)


# Arguments


def add_prompt_arguments(parser):
    add = parser.add_argument_group("prompts: give one of the first three").add_argument
    add("--prompts", nargs="+", help="The prompts themselves.")
    add("--prompts_file", help=".txt with one prompt a line, .tsv, .csv or .parquet.")
    add("--dataset_name", help="Hub id or local folder of a dataset with a column of prompts.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split_name", default="train", help="Split of the dataset.")
    add("--prompt_column", default="caption", help="Column of the prompts.")
    add("--max_prompts", type=COUNT, help="Use only the first so many prompts.")


def add_drawing_arguments(parser, several=False):
    """With `several`, `--num_inference_steps` and `--guidance_scale` take lists."""
    nargs, one_of = ("+", " Of several, each picture has one at random.") if several else (None, "")
    add = parser.add_argument_group("pictures").add_argument
    add("--seed", type=SEED, default=0, help="Seed of the noise that pictures are drawn from.")
    scheduler = "A scheduler of diffusers, for example DDIMScheduler or ddim. Default: the model's own."
    add("--scheduler", help=scheduler)
    steps, scale = (50, 7.5) if not several else ([50], [7.5])
    steps_help, scale_help = (f"{what}.{one_of}" for what in ("Denoising steps", "Classifier-free guidance; 1: none"))
    add("--num_inference_steps", type=COUNT, nargs=nargs, default=steps, help=steps_help)
    add("--guidance_scale", type=NOT_NEGATIVE, nargs=nargs, default=scale, help=scale_help)
    add("--resolution", type=RESOLUTION, help="Side of the pictures in pixels. Default: the model's own.")
    add("--batch_size", type=COUNT, default=4, help="Pictures drawn at once. The noise does not depend on it.")
    precision = "Precision of the model. Default: fp16 on a GPU, no on the CPU."
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help=precision)


# Prompts


def load_prompts(args):
    """The prompts in order. A `ValueError` names the flag and the line, row or number of what cannot be a prompt."""
    from preference_pairs import one_line

    given = [flag for flag in ("prompts", "prompts_file", "dataset_name") if getattr(args, flag) is not None]
    if len(given) != 1:
        raise ValueError(f"Give one of --prompts, --prompts_file and --dataset_name, not {len(given)} of them.")
    flag, value = given[0], one_line(getattr(args, given[0]), 100)
    try:
        prompts = list(itertools.islice(iterate_prompts(args), args.max_prompts))
    except Exception as error:
        raise ValueError(f"--{flag} {value} cannot be read: {one_line(error)}") from error
    for place, prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip() or re.search("[\0\ud800-\udfff]", prompt):
            text = one_line(repr(prompt), 100)
            raise ValueError(f"--{flag} {value}, {place}: {text} must be a prompt in UTF-8. Correct or remove it.")
    if not prompts:
        raise ValueError(f"--{flag} {value} holds no prompt.")
    return [prompt for _, prompt in prompts]


def iterate_prompts(args):
    """Yields the place and the value of every prompt."""
    suffix = Path(args.prompts_file or "").suffix.lower()
    if args.prompts is not None:
        yield from ((f"number {number}", prompt) for number, prompt in enumerate(args.prompts, start=1))
    elif suffix in (".txt", ".csv", ".tsv"):
        # Bytes that are not UTF-8 become surrogates, which load_prompts refuses.
        with open(args.prompts_file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
            if suffix == ".txt":
                numbered = enumerate(lines, start=1)
                yield from ((f"line {number}", line.rstrip("\r\n")) for number, line in numbered if line.strip())
                return
            # In a .tsv, quotation marks belong to the prompts.
            options = {"strict": True} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            table = csv.DictReader(lines, **options)
            check_column(args, table.fieldnames or [])
            try:
                for row in table:
                    if None in row:
                        raise ValueError(f"line {table.line_num} has too many cells. Quote cells that hold commas.")
                    yield f"line {table.line_num}", row[args.prompt_column]
            except csv.Error as error:
                raise ValueError(f"after line {table.line_num}: {error}.") from error
    elif args.dataset_name is None and suffix != ".parquet":
        raise ValueError("its name must end in .txt, .csv, .tsv or .parquet.")
    else:
        source = {"path": args.dataset_name, "name": args.dataset_config_name, "split": args.dataset_split_name}
        if args.dataset_name is None:
            source = {"path": "parquet", "data_files": args.prompts_file, "split": "train"}
        # Without streaming, all splits would be downloaded with their pictures.
        dataset = load_dataset(**source, streaming=True)
        # A streamed text table does not know its columns before its first row.
        check_column(args, dataset.column_names or list(next(iter(dataset), [])))
        rows = dataset.select_columns(args.prompt_column)
        yield from ((f"row {number}", row[args.prompt_column]) for number, row in enumerate(rows))


def check_column(args, columns):
    if args.prompt_column not in columns:
        raise ValueError(f"it has no column {args.prompt_column} (--prompt_column), but {', '.join(columns)}.")


# Models


class Flags(NamedTuple):
    """The names of the flags that give a model."""

    model: str = "pretrained_model_name_or_path"
    variant: str = "variant"
    revision: str = "revision"
    lora: str = "lora_weights"
    unet: str = "unet"


class Source(NamedTuple):
    """
    What draws pictures: a model, the U-Net that replaces its own or `None`, the file of its LoRA or `None`, the name of the
    scheduler class, and the flags. A U-Net is given by its name and its subfolder or `None`.
    """

    model: str
    variant: str | None
    revision: str | None
    unet: tuple | None
    lora: Path | None
    scheduler: str
    flags: Flags

    def model_digest(self):
        from preference_pairs import MODEL_PARTS, digest_part

        return {part: digest_part(self.model, part, self.revision, self.variant) for part in MODEL_PARTS}

    def unet_digest(self):
        from preference_pairs import digest_part

        return None if self.unet is None else digest_part(self.unet[0], self.unet[1] or "")

    def lora_digest(self):
        return None if self.lora is None else digest_of_file(self.lora)


def open_source(args, flags, model, variant, revision, lora, unet=None):
    """A `Source`. A `ValueError` names the flag that is wrong, as far as that shows before weights are loaded."""
    from preference_pairs import one_line

    from diffusers import DiffusionPipeline

    if Path(model).is_file():
        raise ValueError(
            f"--{flags.model} {model} is a single file. Give the folder that StableDiffusionPipeline (or "
            f"StableDiffusionXLPipeline).from_single_file({model!r}).save_pretrained(folder) writes."
        )
    try:
        index = DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flags.model} {model} is no hub id or folder of a pipeline: {one_line(error)}") from error
    check_variant(flags, model, variant, revision, index)
    lora_file = None if lora is None else find_lora_file(flags, lora)
    found_unet = None if unet is None else find_unet(flags, model, revision, unet)
    return Source(model, variant, revision, found_unet, lora_file, choose_scheduler(args, model, index), flags)


def choose_scheduler(args, model, index):
    """The name of the scheduler class: that of `--scheduler`, or the model's own. `index` is its model_index.json."""
    import diffusers

    default = index.get("scheduler", [None, None])[1]
    if args.scheduler in (None, default):
        return default
    names = sorted(scheduler.__name__ for scheduler in getattr(diffusers, default)().compatibles)
    # The noise levels of EDM's schedulers suit EDM's models alone.
    names = [name for name in names if name.startswith("EDM") == default.startswith("EDM")]
    # Papers write DDIM, not DDIMScheduler.
    by_short_name = {name.removesuffix("Scheduler").casefold(): name for name in names}
    wanted = args.scheduler.removesuffix("Scheduler").casefold()
    if wanted not in by_short_name:
        raise ValueError(f"--scheduler {args.scheduler} does not suit {model}. Give one of {', '.join(names)}.")
    return by_short_name[wanted]


def find_unet(flags, model, revision, unet):
    """A U-Net that is given by its hub id or folder: its name and its subfolder. Those of whole models are in unet."""
    from preference_pairs import one_line

    from diffusers import UNet2DConditionModel

    own, found, reasons = UNet2DConditionModel.load_config(model, revision=revision, subfolder="unet"), None, []
    for subfolder in (None, "unet"):
        try:
            found = UNet2DConditionModel.load_config(unet, subfolder=subfolder)
            break
        except (OSError, ValueError) as error:
            reasons.append(one_line(error))
    if found is None:
        raise ValueError(f"--{flags.unet} {unet} is no hub id or folder of a U-Net: {reasons[0]}")
    for name in ("cross_attention_dim", "in_channels", "addition_embed_type"):
        if found.get(name) != own.get(name):
            raise ValueError(
                f"--{flags.unet} {unet} does not fit --{flags.model} {model}: its {name} is {found.get(name)}, but must be "
                f"{own.get(name)}."
            )
    return unet, subfolder


def check_variant(flags, model, variant, revision, index):
    """A `ValueError` if a component has only weights of another variant. Pipelines fall back to files of no variant."""
    try:
        files = [file.relative_to(model).as_posix() for file in Path(model).glob("*/*")]
        files = files or list_repo_files(model, revision=revision)
    except Exception:
        # Offline, loading from the cache shows what is there.
        return
    for component in index:
        matches = (re.fullmatch(f"{component}/{WEIGHTS}", file) for file in files)
        variants = {match[1] for match in matches if match}
        if variants and not variants & {None, variant}:
            raise ValueError(
                f"--{flags.model} {model}: {component} has only files of a variant. Give --{flags.variant} {min(variants)}."
            )


def find_lora_file(flags, lora):
    """The file of a LoRA that is given by its file, folder or hub id."""
    from preference_pairs import one_line

    path = Path(lora)
    if not path.exists():
        try:
            path = Path(snapshot_download(str(lora), allow_patterns="*.safetensors", ignore_patterns="*/*"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--{flags.lora} {lora} exists neither here nor on the hub: {one_line(error)}") from error
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [file for file in files if file.name == LORA_NAME] or files
    if len(files) != 1:
        raise ValueError(
            f"--{flags.lora} {lora} holds {len(files)} .safetensors files and no {LORA_NAME}. Give the file itself."
        )
    return files[0]


def choose_precision(args, accelerator):
    """`--mixed_precision` or its default: half precision is twice as fast on a GPU."""
    return args.mixed_precision or ("no" if accelerator.device.type == "cpu" else "fp16")


def load_pipeline(args, source):
    """A source's pipeline without its LoRA, on the CPU. A `ValueError` says that it or its U-Net cannot be loaded whole."""
    import torch
    from packaging.version import Version
    from preference_pairs import find_fault, one_line
    from safetensors import SafetensorError

    import diffusers

    # One bar for each component, in the midst of that of the pictures.
    diffusers.logging.disable_progress_bar()
    dtype_name = "torch_dtype" if Version(diffusers.__version__) < Version("0.40.0") else "dtype"
    dtype = {dtype_name: {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)}
    components = {}
    if source.unet is not None:
        name, subfolder = source.unet
        try:
            unet = diffusers.UNet2DConditionModel.from_pretrained(name, subfolder=subfolder, **dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = find_fault(name) or one_line(error)
            raise ValueError(f"--{source.flags.unet} {name} cannot be loaded: {reason}") from error
        components["unet"] = unet
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            source.model, variant=source.variant, revision=source.revision, **components, **dtype
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"--{source.flags.model} {source.model}, --{source.flags.variant} {source.variant} cannot be loaded: "
            f"{find_fault(source.model) or one_line(error)}"
        ) from error
    if hasattr(pipeline, "safety_checker"):
        # No safety checker: a picture that it blackens would lose.
        pipeline.safety_checker = None
    if args.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, source.scheduler).from_config(pipeline.scheduler.config)
    return pipeline


def load_pipelines(args, sources, device="cpu"):
    """
    Yields each source and its pipeline. Sources in a row that differ in their LoRA alone share a model. A `ValueError` says what
    cannot be loaded whole.
    """
    pipeline = loaded = None
    for source in sources:
        if (model := (source.model, source.variant, source.revision, source.unet)) != loaded:
            # Frees its memory before the next is loaded.
            pipeline = None
            pipeline, loaded = load_pipeline(args, source).to(device), model
            pipeline.set_progress_bar_config(disable=True)
        else:
            pipeline.unload_lora_weights()
        if source.lora is not None:
            load_lora(pipeline, f"--{source.flags.lora} {source.lora}", source.lora, "lora")
        yield source, pipeline


def load_lora(pipeline, named, file, adapter_name):
    """
    Adds a LoRA to a pipeline. A `ValueError` says that it does not fit: diffusers itself would skip layers that the model lacks
    and the scales of a DoRA in kohya's format. `named` is the flag and its value.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from preference_pairs import find_fault, one_line
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
        layers = [LORA_UP.split(name)[0] for name in names if LORA_UP.search(name)]
        # Older versions of diffusers ask the hub unless the file's name is given.
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=adapter_name)
    except Exception as error:
        reason = find_fault(file) or one_line(error)
        raise ValueError(f"{named} does not fit {type(pipeline).__name__}: {reason}") from error
    if scale := next((name for name in names if name.endswith("dora_scale")), None):
        raise ValueError(
            f"{named} holds {scale}, which diffusers leaves out. Give a plain LoRA, or a DoRA as PEFT saves it."
        )
    # transformers 5 has no `text_model`, but files have it.
    fitting = {
        f"{component}.{name}".replace("text_model.", ""): module
        for component, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        for name, module in part.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
        if not any(weight.is_meta for weight in module.parameters())
    }
    if len(fitting) < max(len(layers), 1):
        missing = next((layer for layer in layers if layer.replace("text_model.", "") not in fitting), None)
        raise ValueError(
            f"{named}: {len(fitting)} of its {len(layers)} layers fit the model, not {missing}. Give a LoRA of this model,"
            f" in the format of {type(pipeline).__name__}.save_lora_weights."
        )
    for layer, strength in read_strengths(pipeline, file).items():
        fitting[layer.replace("text_model.", "")].scaling[adapter_name] = strength


def read_strengths(pipeline, file):
    """
    What a LoRA's file multiplies the update of each layer by, alpha / rank: diffusers gives some layers the alpha of others.
    Empty if the file holds PEFT's configuration, which says it.
    """
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    options = {"unet_config": pipeline.unet.config, "return_lora_metadata": True}
    tensors, alphas, config = pipeline.lora_state_dict(file.parent, weight_name=file.name, **options)
    if config:
        return {}
    strengths = {}
    for name, down in tensors.items():
        if LORA_DOWN.search(name):
            alpha = (alphas or {}).get(f"{name.split('.lora.')[0]}.alpha", len(down))
            strengths[name] = alpha / len(down)
    text = {name: strengths.pop(name) for name in list(strengths) if name.startswith("text_encoder")}
    if text:
        text = convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))
    strengths = {**convert_unet_state_dict_to_peft(strengths), **text}
    return {name.removesuffix(".lora_A.weight"): strength for name, strength in strengths.items()}


# Pictures


class Picture(NamedTuple):
    """A picture to draw: its file, and what differs between the pictures of a run."""

    path: Path
    prompt: str
    source: Source
    seed: int
    num_inference_steps: int
    guidance_scale: float


def save_settings(folder, settings, weights, prompts):
    """
    Writes what the pictures of a folder depend on: settings by flag, digests of weights by flag, and prompts. Returns all
    prompts of the folder. A `ValueError` says that its pictures were drawn with something else.
    """
    file = folder / SETTINGS_NAME
    drawn = [*folder.glob("*.png"), *folder.glob(RECORD_NAME)]
    if drawn and not file.is_file():
        raise ValueError(
            f"{drawn[0]} is not from this tool: {folder} has no {SETTINGS_NAME}. Give another --output_dir."
        )
    if file.is_file() and not {"weights", "prompts"} <= set(
        re.findall(r'"(\w+)": ', file.read_text(encoding="utf-8"))
    ):
        raise ValueError(f"{file} is not from this tool. Give another --output_dir.")
    if any(folder.glob("*.png")):
        saved = json.loads(file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if value != saved.get(name):
                raise ValueError(
                    f"--{name} is {value!r}, but was {saved.get(name)!r} for the pictures in {folder}. Remove them, or "
                    "give another --output_dir."
                )
        for name, digest in weights.items():
            if digest != saved["weights"].get(name):
                raise ValueError(
                    f"--{name} holds other weights than for the pictures in {folder}. Remove them, or give another "
                    "--output_dir."
                )
        # More prompts may follow those of before.
        num_common = min(len(saved["prompts"]), len(prompts))
        if saved["prompts"][:num_common] != prompts[:num_common]:
            raise ValueError(
                f"The prompts are not those of the pictures in {folder}. Remove them, or give another --output_dir."
            )
        prompts = max(prompts, saved["prompts"], key=len)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**settings, "weights": weights, "prompts": prompts}, indent=2)
    with whole_file(file) as incomplete:
        incomplete.write_text(text, encoding="utf-8")
    return prompts


def list_pictures(args, folder, prompts, source):
    """The `--num_images_per_prompt` pictures of each prompt, prompt by prompt. Each has the noise of its own seed."""
    pictures = []
    for index, number in itertools.product(range(len(prompts)), range(args.num_images_per_prompt)):
        name = f"{index:05}.png" if args.num_images_per_prompt == 1 else f"{index:05}-{number:02}.png"
        seed = args.seed + len(pictures)
        pictures.append(
            Picture(folder / name, prompts[index], source, seed, args.num_inference_steps, args.guidance_scale)
        )
    return pictures


def draw_pictures(args, accelerator, pictures):
    """
    Draws this process's share of the pictures that are missing, each from the noise of its own seed. A picture's batch is always
    the same: values are rounded otherwise in another batch, and an interrupted run would not draw the same pictures.
    """
    by_settings = defaultdict(list)
    for picture in pictures:
        by_settings[picture.source, picture.num_inference_steps, picture.guidance_scale].append(picture)
    batches = [
        of_settings[start : start + args.batch_size]
        for of_settings in by_settings.values()
        for start in range(0, len(of_settings), args.batch_size)
    ]
    missing = [batch for batch in batches if not all(picture.path.is_file() for picture in batch)]
    # No process draws before all have seen what is missing.
    accelerator.wait_for_everyone()
    missing = missing[accelerator.process_index :: accelerator.num_processes]
    if not missing:
        return
    by_source = defaultdict(list)
    for batch in missing:
        by_source[batch[0].source].append(batch)
    if len(by_source) > 1:
        # What cannot be loaded is reported before any draws.
        deque(load_pipelines(args, by_source), maxlen=0)
    num_pictures = sum(map(len, missing))
    with tqdm(total=num_pictures, desc="Drawing", disable=not accelerator.is_local_main_process) as progress:
        for source, pipeline in load_pipelines(args, by_source, accelerator.device):
            for batch in by_source[source]:
                draw_batch(args, pipeline, batch)
                progress.update(len(batch))
            # Another reference would keep its memory.
            del pipeline


def draw_batch(args, pipeline, batch):
    """
    Draws pictures of the same settings and saves those that are missing. A `ValueError` says that one is not finite: diffusers
    would make NaN black and infinite values black or white.
    """
    import torch

    decoded = []
    hook = pipeline.vae.decoder.register_forward_hook(lambda *values: decoded.append(values[-1]))
    values = pipeline(
        [picture.prompt for picture in batch],
        height=args.resolution,
        width=args.resolution,
        num_inference_steps=batch[0].num_inference_steps,
        guidance_scale=batch[0].guidance_scale,
        generator=[torch.Generator().manual_seed(picture.seed) for picture in batch],
        output_type="pt",
    ).images
    hook.remove()
    for picture, finite in zip(batch, torch.cat(decoded).isfinite().flatten(1).all(dim=1).tolist()):
        if not finite:
            raise ValueError(
                f"{picture.path.name} of {picture.prompt!r:.100} has values that are not finite: "
                f"--{picture.source.flags.model} {picture.source.model} overflows at --mixed_precision "
                f"{args.mixed_precision}. Give --mixed_precision no or bf16, or another model."
            )
    images = pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(values))
    for picture, image in zip(batch, images):
        if not picture.path.is_file():
            save_picture(image, picture.path)


def save_picture(image, path):
    try:
        with whole_file(path) as incomplete:
            image.save(incomplete, "PNG")
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error}. The same command goes on with the pictures that are missing."
        ) from error
