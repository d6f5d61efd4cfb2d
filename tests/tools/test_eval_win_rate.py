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


import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import eval_win_rate
import numpy as np
import pictures
import preference_pairs
import pytest
import safetensors.torch
import scorer_models
import scorers
import torch
from common import locked_folder
from conftest import ROOT, reset_accelerate, run_on_two_processes
from datasets import Dataset
from intervals import win_rate_interval
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from scipy.stats import binomtest
from tiny_checkpoints import change_weights, copy_checkpoint

from diffusers import DiffusionPipeline
from diffusers.loaders import lora_base


PROMPTS = ["a cat", "a dog", "a bird, and <b>more</b>"]


@pytest.fixture
def evaluate(checkpoints, clip, tmp_path):
    def command(*flags, output_dir=tmp_path / "evaluation", prompts=PROMPTS, **options):
        options = {
            "pretrained_model_name_or_path": checkpoints["sd15"],
            "pickscore_model_name_or_path": clip,
            "pickscore_processor_name_or_path": clip,
            "clipscore_model_name_or_path": clip,
            "num_inference_steps": 2,
            "resolution": 32,
            "output_dir": output_dir,
            **options,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*words, *(["--prompts", *prompts] if prompts else []), *flags]

    def run(*flags, **options):
        reset_accelerate()
        args = eval_win_rate.parse_args(command(*flags, **options))
        eval_win_rate.main(args)
        return Path(args.output_dir)

    run.command = command
    return run


def picture(folder, side, index):
    return np.asarray(Image.open(folder / side / f"{index:05}.png")).astype(float)


def test_a_lora_against_its_base(evaluate, run_sd15, checkpoints, capsys):
    run_sd15(loss_space="latent", learning_rate=0.1)
    folder = evaluate("--scorers", "pickscore", "clipscore", lora_weights=run_sd15.output_dir)
    rows = list(csv.DictReader(open(folder / "scores.csv")))
    assert [row["prompt"] for row in rows] == PROMPTS
    for index in range(len(PROMPTS)):
        assert np.abs(picture(folder, "model", index) - picture(folder, "baseline", index)).max() > 0
    wins = sum(float(row["pickscore_model"]) > float(row["pickscore_baseline"]) for row in rows)
    assert "| pickscore |" in capsys.readouterr().out
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert f" {wins / 3:.1%} " in summary.splitlines()[2]
    clip = evaluate.command()[3]
    assert re.search(
        rf"\| clipscore \| {clip}@[0-9a-f]{{12}} \|\n\nScored with torch \d.* and transformers \d", summary
    )

    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;more" in page and "<b>more" not in page
    assert f"<h1>The model wins {wins / 3:.1%} by pickscore (95 %: " in page
    assert f"<th>model<td>{checkpoints['sd15']} with {run_sd15.output_dir}" in page
    for index, (row, line) in enumerate(zip(rows, page.split("<tr data-margins=")[1:])):
        margins = [float(row[f"{name}_model"]) - float(row[f"{name}_baseline"]) for name in ("pickscore", "clipscore")]
        assert json.loads(line.partition(">")[0].strip('"')) == margins
        winner = "model" if margins[0] > 0 else "baseline"
        assert f'<figure class="winner"><img src="{winner}/{index:05}.png"' in line and line.count("winner") == 1


def test_a_model_against_itself(evaluate, monkeypatch):
    # Also where a batch is smaller than the others.
    monkeypatch.setattr(scorers, "SCORING_BATCH_SIZE", 2)
    folder = evaluate("--scorers", "clipscore")
    for index in range(len(PROMPTS)):
        assert np.array_equal(picture(folder, "model", index), picture(folder, "baseline", index))
    assert 'class="winner"' not in (folder / "index.html").read_text(encoding="utf-8")
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert "| 50.0% |" in summary
    for row in (
        "scheduler | DDPMScheduler",
        "num_inference_steps | 2",
        "guidance_scale | 7.5",
        "resolution | 32 x 32",
    ):
        assert f"| {row} | {row.partition(' | ')[2]} |\n" in summary
    for row in ("seed | 0", "mixed_precision | no", "lora_weights | None", "variant | None"):
        assert f"| {row} |" in summary


def test_scheduler_is_chosen(evaluate, tmp_path):
    own, other = evaluate(), evaluate(scheduler="DDIMScheduler", output_dir=tmp_path / "ddim")
    assert np.abs(picture(own, "baseline", 0) - picture(other, "baseline", 0)).max() > 0
    assert "| scheduler | DDIMScheduler | DDIMScheduler |" in (other / "summary.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="--scheduler is 'DDIMScheduler'.*'DDPMScheduler'"):
        evaluate(scheduler="DDIMScheduler")
    # The model's own by its name is no change, nor is a short name.
    evaluate(scheduler="DDPMScheduler")
    evaluate(scheduler="ddim", output_dir=tmp_path / "ddim")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "euler-a"])
def test_schedulers_that_do_not_suit_are_errors(evaluate, name, tmp_path):
    with pytest.raises(ValueError, match=f"--scheduler {name} .*DDIMScheduler, .*PNDMScheduler"):
        evaluate(scheduler=name)
    assert not (tmp_path / "evaluation").exists()


def test_a_unet_alone(evaluate, checkpoints, tmp_path):
    options = {"prompts": PROMPTS[:1]}
    change_weights(copy_checkpoint(checkpoints["sd15"], tmp_path / "other") / "unet")
    shutil.copytree(tmp_path / "other" / "unet", tmp_path / "alone")
    folder = evaluate(**options, unet=tmp_path / "alone", baseline_model_name_or_path=tmp_path / "other")
    assert np.array_equal(picture(folder, "model", 0), picture(folder, "baseline", 0))
    # In the folder of a whole model, and for the baseline.
    folder = evaluate(**options, baseline_unet=tmp_path / "other", output_dir=tmp_path / "swapped")
    assert np.abs(picture(folder, "model", 0) - picture(folder, "baseline", 0)).max() > 0
    assert np.array_equal(picture(folder, "baseline", 0), picture(tmp_path / "evaluation", "model", 0))
    assert f"| unet | None | {tmp_path / 'other'} |" in (folder / "summary.md").read_text(encoding="utf-8")
    change_weights(tmp_path / "alone")
    with pytest.raises(ValueError, match="--unet holds other weights .*evaluation/model"):
        evaluate(**options, unet=tmp_path / "alone", baseline_model_name_or_path=tmp_path / "other")


@pytest.mark.bad_input
@pytest.mark.parametrize("flag", ["unet", "baseline_unet"])
def test_unets_that_do_not_fit_are_errors(evaluate, flag, checkpoints, tmp_path):
    with pytest.raises(
        ValueError, match=f"--{flag} {checkpoints['sdxl']} does not fit .*: its addition_embed_type is text_time"
    ):
        evaluate(**{flag: checkpoints["sdxl"]})
    with pytest.raises(ValueError, match=f"--{flag} {tmp_path}/nowhere is no hub id or folder of a U-Net"):
        evaluate(**{flag: tmp_path / "nowhere"})
    assert not (tmp_path / "evaluation").exists()


@pytest.fixture(scope="module")
def fp16(checkpoints, tmp_path_factory):
    """A checkpoint of which there are only files of the variant fp16."""
    folder = tmp_path_factory.mktemp("fp16")
    DiffusionPipeline.from_pretrained(checkpoints["sd15"]).save_pretrained(folder, variant="fp16")
    return folder


def test_variants(evaluate, fp16, checkpoints, tmp_path):
    folder = evaluate(pretrained_model_name_or_path=fp16, variant="fp16")
    assert "| variant | fp16 | fp16 |" in (folder / "summary.md").read_text(encoding="utf-8")
    # Another baseline has a variant of its own, and a component without the variant falls back.
    mixed = shutil.copytree(fp16, tmp_path / "mixed")
    (mixed / "vae/diffusion_pytorch_model.fp16.safetensors").rename(mixed / "vae/diffusion_pytorch_model.safetensors")
    folder = evaluate(
        pretrained_model_name_or_path=mixed,
        variant="fp16",
        baseline_model_name_or_path=checkpoints["sd15"],
        output_dir=tmp_path / "mixed-evaluation",
    )
    assert "| variant | fp16 | None |" in (folder / "summary.md").read_text(encoding="utf-8")
    assert np.array_equal(picture(folder, "model", 0), picture(folder, "baseline", 0))


@pytest.mark.bad_input
def test_files_of_a_variant_are_named(evaluate, fp16, checkpoints, tmp_path):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .* --variant fp16"):
        evaluate(pretrained_model_name_or_path=fp16)
    with pytest.raises(ValueError, match="--baseline_model_name_or_path .* --baseline_variant fp16"):
        evaluate(baseline_model_name_or_path=fp16)
    assert not (tmp_path / "evaluation").exists()
    with pytest.raises(
        ValueError, match=f"--pretrained_model_name_or_path {checkpoints['sd15']}, --variant fp8 cannot"
    ):
        evaluate(variant="fp8")


def test_variant_and_revision_on_the_hub(evaluate, monkeypatch):
    def list_files(model, revision):
        assert (model, revision) == ("someone/model", "v2")
        return ["README.md", "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "unet/config.json"]

    def no_connection(model, revision):
        raise RuntimeError("no connection")

    index = {"_class_name": "X", "unet": ["diffusers", "X"], "scheduler": ["diffusers", "DDPMScheduler"]}
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda model, revision: index)
    monkeypatch.setattr(pictures, "list_repo_files", list_files)
    command = evaluate.command(pretrained_model_name_or_path="someone/model", revision="v2")
    args = eval_win_rate.parse_args(command)
    with pytest.raises(ValueError, match="unet .*--variant fp16"):
        eval_win_rate.open_side(args, "model")
    args = eval_win_rate.parse_args([*command, "--variant", "fp16", "--baseline_revision", "v2"])
    assert eval_win_rate.open_side(args, "model")[:-1] == eval_win_rate.open_side(args, "baseline")[:-1]
    monkeypatch.setattr(pictures, "list_repo_files", no_connection)
    opened = eval_win_rate.open_side(args, "model")

    loaded = {}
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda model, **options: loaded.update(options))
    pictures.load_pipeline(args, opened)
    assert (loaded["variant"], loaded["revision"]) == ("fp16", "v2")


@pytest.mark.bad_input
@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "baseline_model_name_or_path"])
def test_what_is_no_pipeline_is_an_error(evaluate, flag, tmp_path):
    safetensors.torch.save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"--{flag} .*model.safetensors.*from_single_file.*save_pretrained"):
        evaluate(**{flag: tmp_path / "model.safetensors"})
    with pytest.raises(ValueError, match=f"--{flag} {tmp_path}/nowhere "):
        evaluate(**{flag: tmp_path / "nowhere"})
    assert not (tmp_path / "evaluation").exists()


def save_lora(model, folder, seed=0, **options):
    """A LoRA of random weights for the attention of a model, in diffusers' format."""
    torch.manual_seed(seed)
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False, **options))
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return folder / pictures.LORA_NAME


def test_local_loras_are_loaded_by_their_name(evaluate, checkpoints, tmp_path, monkeypatch):
    def older(*args, **options):
        # As versions of diffusers before 0.40 do for a folder as well.
        raise ValueError("When using the offline mode, you must specify a `weight_name`.")

    monkeypatch.setattr(lora_base, "_best_guess_weight_name", older)
    file = save_lora(checkpoints["sd15"], tmp_path / "lora")
    (tmp_path / "alone").mkdir()
    shutil.copy(file, tmp_path / "alone" / "style.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "lora" / "kohya.safetensors")
    folders = [
        evaluate(lora_weights=lora, output_dir=tmp_path / str(number))
        for number, lora in enumerate((tmp_path / "lora", tmp_path / "alone", file))
    ]
    for folder in folders:
        assert np.abs(picture(folder, "model", 0) - picture(folder, "baseline", 0)).max() > 0
        assert np.array_equal(picture(folder, "model", 0), picture(folders[0], "model", 0))


def test_a_lora_draws_as_if_it_were_merged(evaluate, checkpoints, tmp_path):
    file = save_lora(checkpoints["sd15"], tmp_path / "lora")
    # The trainers write this file beside it.
    (tmp_path / "lora" / "pytorch_lora_weights_kohya.safetensors").touch()
    merged = DiffusionPipeline.from_pretrained(checkpoints["sd15"])
    merged.load_lora_weights(file.parent, weight_name=file.name)
    merged.fuse_lora()
    merged.unload_lora_weights()
    merged.save_pretrained(tmp_path / "merged")
    folder = evaluate(lora_weights=file.parent, baseline_model_name_or_path=tmp_path / "merged")
    assert np.abs(picture(folder, "model", 0) - picture(folder, "baseline", 0)).max() <= 1
    settings = json.loads((folder / "model" / "settings.json").read_text())
    assert settings["lora_weights"] == str(file.parent)
    assert settings["weights"]["lora_weights"] == hashlib.sha256(file.read_bytes()).hexdigest()


def get_layer(pipeline, name):
    component, _, layer = name.partition(".")
    return getattr(pipeline, component).get_submodule(layer)


def random_kohya_lora(pipeline):
    """A LoRA in kohya's format for all kinds of layers, each with a rank and an alpha of its own, and its updates by layer."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te_text_model"}
    if hasattr(pipeline, "text_encoder_2"):
        prefixes |= {"text_encoder": "lora_te1_text_model", "text_encoder_2": "lora_te2_text_model"}
    targets = ("to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in", "ff.net.2", "q_proj", "out_proj", "fc1")
    lora, updates, generator = {}, {}, torch.Generator().manual_seed(0)
    for component, prefix in prefixes.items():
        for layer, module in getattr(pipeline, component).named_modules():
            if not layer.endswith(targets):
                continue
            rank, weight = 2 + len(updates) % 3, module.weight
            name = f"{prefix}_{layer.replace('.', '_')}".replace("text_model_text_model", "text_model")
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(len(weight), rank, *(weight.dim() - 2) * [1], generator=generator)
            lora |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            # Some files give some layers no alpha: it is the rank.
            alpha = (None, 0.1, 0.2, 0.5)[len(updates) % 4]
            if alpha is not None:
                lora[f"{name}.alpha"] = torch.tensor(alpha)
            updates[f"{component}.{layer}"] = (
                (alpha or rank) / rank * (up.flatten(1) @ down.flatten(1)).view_as(weight)
            )
    return lora, updates


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_layers_have_the_strength_that_the_file_gives_them(checkpoints, tmp_path, kind):
    pipeline = DiffusionPipeline.from_pretrained(checkpoints[kind])
    lora, updates = random_kohya_lora(pipeline)
    safetensors.torch.save_file(lora, tmp_path / "lora.safetensors")
    weights = {layer: get_layer(pipeline, layer).weight.clone() for layer in updates}
    pictures.load_lora(pipeline, "--lora_weights", tmp_path / "lora.safetensors", "lora")
    for layer, update in updates.items():
        merged = get_layer(pipeline, layer)
        merged.merge()
        torch.testing.assert_close(merged.base_layer.weight - weights[layer], update, rtol=1e-4, atol=1e-5)


def test_a_dora_of_peft_keeps_its_scales(checkpoints, tmp_path):
    file = save_lora(checkpoints["sd15"], tmp_path / "lora", use_dora=True)
    lora, ending = safetensors.torch.load_file(file), ".lora_magnitude_vector"
    lora = {name: 1.5 * weight if name.endswith(ending) else weight for name, weight in lora.items()}
    safetensors.torch.save_file(lora, file)
    pipeline = DiffusionPipeline.from_pretrained(checkpoints["sd15"])
    pictures.load_lora(pipeline, "--lora_weights", file, "lora")
    scales = {name: weight for name, weight in lora.items() if name.endswith(ending)}
    assert scales
    for name, scale in scales.items():
        layer = get_layer(pipeline, name.removesuffix(ending))
        assert torch.equal(layer.lora_magnitude_vector["lora"].weight, scale)


@pytest.mark.bad_input
@pytest.mark.parametrize("flag", ["lora_weights", "baseline_lora_weights"])
def test_a_dora_in_kohyas_format_is_refused(evaluate, checkpoints, tmp_path, flag):
    lora, _ = random_kohya_lora(DiffusionPipeline.from_pretrained(checkpoints["sd15"]))
    name = "lora_unet_mid_block_attentions_0_proj_in"
    lora[f"{name}.dora_scale"] = torch.ones(1, len(lora[f"{name}.lora_down.weight"][0]), 1, 1)
    safetensors.torch.save_file(lora, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match=f"--{flag} {tmp_path}/dora.safetensors .*proj_in.dora_scale"):
        evaluate(**{flag: tmp_path / "dora.safetensors"})
    assert not list(tmp_path.glob("evaluation/*/*.png")), "neither side is drawn"


@pytest.mark.bad_input
def test_two_loras_are_refused(evaluate, checkpoints, tmp_path):
    lora = save_lora(checkpoints["sd15"], tmp_path / "lora").parent
    with pytest.raises(ValueError, match=re.escape(f"--lora_weights {lora}+{lora} ")):
        evaluate(lora_weights=f"{lora}+{lora}")
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("flag", ["lora_weights", "baseline_lora_weights"])
def test_loras_that_do_not_fit_are_errors(evaluate, checkpoints, flag, tmp_path):
    lora = safetensors.torch.load_file(save_lora(checkpoints["sd15"], tmp_path / "lora"))
    foreign = safetensors.torch.load_file(save_lora(checkpoints["sdxl"], tmp_path / "sdxl"))
    half = next(name for name in lora if ".lora_B" in name)
    layer = half.partition(".lora_B")[0]
    wider = {name: torch.cat([value, value]) if ".lora_B" in name else value for name, value in lora.items()}
    for name, tensors, message in [
        ("peft", {f"base_model.model.{key[5:]}": value for key, value in lora.items()}, ": 0 of "),
        ("sdxl", foreign, ": (?!0).* unet"),
        (
            "part",
            {key.replace(layer, f"{layer}x"): value for key, value in lora.items()},
            f": 27 of its 28 .*{layer}x",
        ),
        (
            "half",
            {key.replace(half, f"unet.x.{half}"): value for key, value in lora.items()},
            f": 27 of its 28 .*unet.x.{layer}",
        ),
        ("wider", wider, " .*StableDiffusionPipeline: .*size mismatch"),
        ("none", {"x": torch.zeros(1)}, " .*StableDiffusionPipeline"),
    ]:
        (tmp_path / name).mkdir(exist_ok=True)
        file = tmp_path / name / pictures.LORA_NAME
        safetensors.torch.save_file(tensors, file)
        with pytest.raises(ValueError, match=f"--{flag} {file}{message}"):
            evaluate(**{flag: tmp_path / name})
    assert not list(tmp_path.glob("evaluation/*/*.png")), "neither side is drawn"


@pytest.mark.bad_input
def test_loras_that_are_not_there_are_errors_at_once(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="--lora_weights .*/two .* 0 .safetensors"):
        evaluate(lora_weights=tmp_path / "two")
    for name in "ab":
        (tmp_path / "two" / f"{name}.safetensors").touch()
    with pytest.raises(ValueError, match="--baseline_lora_weights .*/two .* 2 .safetensors"):
        evaluate(baseline_lora_weights=tmp_path / "two")
    for lora in (tmp_path / "nowhere", "someone/nothing"):
        with pytest.raises(ValueError, match=f"--lora_weights {lora} "):
            evaluate(lora_weights=lora)


def test_every_prompt_has_noise_of_its_own(evaluate):
    folder = evaluate("--scorers", "clipscore", prompts=["a cat", "a cat"])
    assert not np.array_equal(picture(folder, "model", 0), picture(folder, "model", 1))


def test_several_pictures_of_a_prompt(evaluate, checkpoints):
    folder = evaluate(
        "--scorers", "clipscore", num_images_per_prompt=2, seed=7, baseline_model_name_or_path=checkpoints["sd2"]
    )
    rows = list(csv.DictReader(open(folder / "scores.csv")))
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [row["index"] for row in rows] == list("001122") and [row["seed"] for row in rows] == list("789") + [
        "10",
        "11",
        "12",
    ]
    scores = [np.reshape([float(row[f"clipscore_{side}"]) for row in rows], (3, 2)) for side in ("model", "baseline")]
    result = eval_win_rate.compare(*scores)
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert f"| {result.win_rate:.1%} | {result.low:.1%} – {result.high:.1%} |" in summary
    assert {path.name for path in folder.glob("model/*.png")} == {
        f"0000{i}-0{j}.png" for i in range(3) for j in range(2)
    }
    with pytest.raises(ValueError, match="--num_images_per_prompt is 1, but was 2"):
        evaluate()


def test_sides_may_be_swapped(evaluate, checkpoints, tmp_path):
    lora = save_lora(checkpoints["sd15"], tmp_path / "lora").parent
    there = evaluate(output_dir=tmp_path / "there", lora_weights=lora, baseline_model_name_or_path=checkpoints["sd2"])
    back = evaluate(
        output_dir=tmp_path / "back",
        pretrained_model_name_or_path=checkpoints["sd2"],
        baseline_model_name_or_path=checkpoints["sd15"],
        baseline_lora_weights=lora,
    )
    for row, other in zip(*(list(csv.DictReader(open(folder / "scores.csv"))) for folder in (there, back))):
        for scorer in ("pickscore", "clipscore"):
            assert row[f"{scorer}_model"] == other[f"{scorer}_baseline"] != row[f"{scorer}_baseline"]
            assert row[f"{scorer}_baseline"] == other[f"{scorer}_model"]


def test_noise_does_not_depend_on_the_batch(evaluate, tmp_path):
    one, three = (evaluate(output_dir=tmp_path / str(size), batch_size=size) for size in (1, 3))
    for index in range(len(PROMPTS)):
        assert np.abs(picture(one, "model", index) - picture(three, "model", index)).max() <= 1


def test_pictures_are_drawn_once(evaluate):
    folder = evaluate(prompts=PROMPTS[:2])
    whole = (folder / "model" / "00001.png").read_bytes()
    (folder / "model" / "00001.png").unlink()
    evaluate(prompts=PROMPTS[:2])
    assert (folder / "model" / "00001.png").read_bytes() == whole
    (folder / "model" / "00001.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    evaluate()
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    # The picture that was removed, and both sides of the new prompt.
    names = ["baseline/00002.png", "model/00001.png", "model/00002.png"]
    assert sorted(str(path.relative_to(folder)) for path in after if before.get(path) != after[path]) == names


def test_broken_pictures_are_errors(evaluate):
    folder = evaluate()
    (folder / "baseline" / "00001.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="baseline/00001.png cannot be read"):
        evaluate()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, message",
    [({"seed": 1}, "--seed is 1.* 0 "), ({"prompts": ["a fish"]}, "prompts .*evaluation/model")],
)
def test_pictures_of_other_settings_are_not_mixed(evaluate, options, message):
    evaluate()
    with pytest.raises(ValueError, match=message):
        evaluate(**options)


@pytest.mark.bad_input
def test_pictures_of_a_lora_that_trained_on_are_not_kept(evaluate, checkpoints, tmp_path):
    lora = save_lora(checkpoints["sd15"], tmp_path / "lora").parent
    evaluate(lora_weights=lora)
    save_lora(checkpoints["sd15"], lora, seed=1)
    with pytest.raises(ValueError, match="--lora_weights .*evaluation/model"):
        evaluate(lora_weights=lora)
    # The other side stays.
    folder = tmp_path / "evaluation"
    before = (folder / "baseline" / "00000.png").stat().st_mtime_ns
    shutil.rmtree(folder / "model")
    evaluate(lora_weights=lora)
    assert (folder / "baseline" / "00000.png").stat().st_mtime_ns == before


@pytest.mark.bad_input
def test_a_mistake_before_the_first_picture_may_be_mended(evaluate, tmp_path):
    with pytest.raises((OSError, ValueError)):
        evaluate(lora_weights=tmp_path / "typo")
    evaluate()


@pytest.mark.bad_input
def test_pictures_of_a_model_that_was_replaced_are_not_kept(evaluate, checkpoints, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoints["sd15"], model)
    evaluate(pretrained_model_name_or_path=model)
    # A copy has other times.
    shutil.rmtree(model)
    shutil.copytree(checkpoints["sd15"], model, copy_function=shutil.copy)
    evaluate(pretrained_model_name_or_path=model)
    change_weights(model / "vae")
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .*evaluation/model"):
        evaluate(pretrained_model_name_or_path=model)


@pytest.mark.bad_input
def test_a_page_of_the_user_is_not_replaced(evaluate, tmp_path):
    page = tmp_path / "site/index.html"
    page.parent.mkdir()
    page.write_text("mine")
    with pytest.raises(ValueError, match="--output_dir .*site holds index.html, which is not from this tool"):
        evaluate(output_dir=page.parent)
    assert page.read_text() == "mine"
    settings = tmp_path / "app/model/settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"theme": "dark"}')
    with pytest.raises(ValueError, match="app/model/settings.json is not from this tool"):
        evaluate(output_dir=tmp_path / "app")
    assert settings.read_text() == '{"theme": "dark"}'


@pytest.mark.bad_input
def test_one_run_at_a_time(evaluate, tmp_path):
    output = tmp_path / "evaluation"
    with locked_folder(output), pytest.raises(ValueError, match=f"--output_dir {output} "):
        evaluate("--scorers", "clipscore", clipscore_model_name_or_path="nowhere")
    assert [path.name for path in output.iterdir()] == [".lock"]


@pytest.mark.bad_input
def test_weights_that_are_not_whole_are_named(evaluate, checkpoints, tmp_path):
    lora = save_lora(checkpoints["sd15"], tmp_path / "lora")
    unet = copy_checkpoint(checkpoints["sd15"], tmp_path / "model") / "unet/diffusion_pytorch_model.safetensors"
    for flag, value, file in [
        ("lora_weights", lora, lora),
        ("pretrained_model_name_or_path", tmp_path / "model", unet),
    ]:
        for data in (b"", file.read_bytes()[:1000]):
            file.write_bytes(data)
            with pytest.raises(ValueError, match=f"--{flag} {value}.* {re.escape(str(file))} is empty"):
                evaluate(**{flag: value})


def test_processes_share_the_prompts(evaluate, tmp_path):
    one = evaluate(output_dir=tmp_path / "one", batch_size=1)
    two = evaluate.command(output_dir=tmp_path / "two", batch_size=1)
    codes, log = run_on_two_processes("tools/eval_win_rate.py", two, tmp_path / "log")
    assert codes == [0, 0], log
    rows, expected = (list(csv.DictReader(open(folder / "scores.csv"))) for folder in (tmp_path / "two", one))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected):
        assert row["prompt"] == other["prompt"]
        for name in ("pickscore_model", "clipscore_baseline"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)


def test_any_folder_any_code_page(evaluate, checkpoints, tmp_path):
    """As on Windows: what the console cannot print is no error, and files are UTF-8 whatever the locale's encoding is."""
    model = shutil.copytree(checkpoints["sd15"], tmp_path / "\u6771\u4eac")
    (tmp_path / "prompts.csv").write_bytes("caption\na cat in \u6771\u4eac\n".encode())
    words = evaluate.command(
        "--prompts_file", str(tmp_path / "prompts.csv"), pretrained_model_name_or_path=model, prompts=None
    )
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "ACCELERATE_USE_CPU": "true",
        "PYTHONIOENCODING": "cp1252",
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONWARNINGS": "error::EncodingWarning:__main__",
    }
    script = ROOT / "tools" / "eval_win_rate.py"
    result = subprocess.run([sys.executable, script, *words], capture_output=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    assert rb"/\u6771\u4eac | " in result.stdout
    folder = tmp_path / "evaluation"
    for name in ("scores.csv", "index.html"):
        assert "a cat in \u6771\u4eac" in (folder / name).read_text(encoding="utf-8")
    assert str(model) in (folder / "summary.md").read_text(encoding="utf-8")
    assert json.loads((folder / "model/settings.json").read_bytes())["prompts"] == ["a cat in \u6771\u4eac"]


def load_prompts(*flags):
    words = ["--pretrained_model_name_or_path", "none", *map(str, flags)]
    return pictures.load_prompts(eval_win_rate.parse_args(words))


@pytest.mark.parametrize(
    "name, text, prompts",
    [
        ("a.txt", "\ufeffa caf\u00e9\r\n\n \r\na\u2028b\x0cc\x85d\n", ["a caf\u00e9", "a\u2028b\x0cc\x85d"]),
        ("a.TXT", "one\ntwo", ["one", "two"]),
        ("a.csv", "\ufeffcaption\r\n001\r\n1.0\r\n\r\nNA\r\nnull\r\n", ["001", "1.0", "NA", "null"]),
        ("a.csv", 'id,caption\n1,"a ""cat"",\na dog"\n2,2024-01-01\n', ['a "cat",\na dog', "2024-01-01"]),
        ("a.csv", "caption\na\u2028b\x0cc\n", ["a\u2028b\x0cc"]),
        ("a.tsv", 'id\tcaption\n1\t"a cat\n2\t007\n', ['"a cat', "007"]),
    ],
)
def test_prompt_files_draw_what_they_say(tmp_path, name, text, prompts):
    (tmp_path / name).write_bytes(text.encode())
    assert load_prompts("--prompts_file", tmp_path / name) == prompts


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", "a cat\na caf\u00e9\n".encode("cp1252"), ", line 2: "),
        ("a.txt", "a cat\n".encode("utf-16"), ", line 1: "),
        ("a.txt", "a cat\n".encode("utf-16-le"), ", line 1: "),
        ("a.csv", "caption\na cat\na caf\u00e9\n".encode("cp1252"), ", line 3: "),
        ("a.csv", b"id,caption\n1,a cat\n2\n", ", line 3: None "),
        ("a.csv", b"id,caption\n1,a cat\n\n2,\n", ", line 4: '' "),
        ("a.csv", b"caption\na cat\na cat, asleep\n", "line 3 "),
        ("a.csv", b'caption\na cat\n"a dog\na bird\n', "after line 2: "),
        ("a.tsv", b"id\tcaption\n1\t \n", ", line 2: ' ' "),
        ("a.csv", b"text\na cat\n", "--prompt_column.* text"),
        ("a.csv", b"", "--prompt_column"),
        ("a.txt", b"\n\n", "holds no prompt"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.json", b"[]", "must end in .txt, .csv, .tsv or .parquet"),
    ],
)
def test_prompt_files_are_refused_by_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts("--prompts_file", tmp_path / name)
    assert f"--prompts_file {tmp_path / name}"[:90] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.bad_input
def test_prompts_of_datasets_are_refused_by_row(tmp_path):
    Dataset.from_dict({"caption": ["a cat", None]}).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("caption\n001\n", encoding="utf-8")
    for flags, message in [
        (["--prompts_file", tmp_path / "a.parquet"], ", row 1: None "),
        (["--dataset_name", tmp_path / "table"], ", row 0: 1 "),
        (["--dataset_name", tmp_path / "nowhere"], "--dataset_name .*nowhere cannot be read"),
        (["--prompts_file", tmp_path / "nowhere.csv"], "--prompts_file .*nowhere.csv cannot be read"),
        (["--prompts", "a cat", "\udc80" + 200 * "x"], r", number 2: '\\udc80x{50}"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_prompts(*flags)
    # What is not asked for is not looked at.
    assert load_prompts("--prompts_file", tmp_path / "a.parquet", "--max_prompts", 1) == ["a cat"]


def test_prompts_from_everywhere(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "prompts.tsv").write_text('Prompt\tCategory\n"a cat" sits\tAnimals\n"a dog\tAnimals\n')
    Dataset.from_dict({"caption": ["a cat", "a dog"]}).to_parquet(str(tmp_path / "prompts.parquet"))
    Dataset.from_dict({"caption": ["a cat", "a dog"]}).to_parquet(str(tmp_path / "folder" / "train.parquet"))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("caption\na cat\na dog\n")

    assert load_prompts("--prompts", "a cat", "a dog") == ["a cat", "a dog"]
    assert load_prompts("--prompts_file", tmp_path / "prompts.txt") == ["a cat", "a dog"]
    assert load_prompts("--prompts_file", tmp_path / "prompts.tsv", "--prompt_column", "Prompt") == [
        '"a cat" sits',
        '"a dog',
    ]
    assert load_prompts("--prompts_file", tmp_path / "prompts.parquet", "--max_prompts", 1) == ["a cat"]
    for name in ("folder", "table"):
        assert load_prompts("--dataset_name", tmp_path / name) == ["a cat", "a dog"]
    for flags, message in [
        ([], "--prompts, --prompts_file and --dataset_name, not 0"),
        (["--prompts", "x", "--dataset_name", "y"], "not 2"),
        (["--prompts_file", tmp_path / "prompts.parquet", "--prompt_column", "text"], "--prompt_column.* caption"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_prompts(*flags)


def test_comparison():
    scores, baseline_scores = np.array([[*range(1, 9), 0, 0], [*[0] * 8, 1, 1]])[:, :, None]
    result = eval_win_rate.compare(scores, baseline_scores)
    assert (result.median, result.baseline_median) == (3.5, 0)
    assert result.win_rate == 0.8 and (result.low, result.high) == win_rate_interval(8 * [1] + 2 * [0])[1:]
    # As R's binom.test gives it.
    assert result.p_value == pytest.approx(0.1094, abs=1e-4)
    tied = eval_win_rate.compare([[1], [2], [3]], [[1], [2], [3]])
    assert tied.win_rate == 0.5 and tied.p_value == 1


def test_pictures_of_a_prompt_are_one_observation():
    scores, baseline_scores = np.random.default_rng(0).random((2, 12, 4))
    result = eval_win_rate.compare(scores, baseline_scores)
    wins = (scores > baseline_scores).mean(axis=1)
    assert result[2:5] == win_rate_interval(wins)
    assert result.p_value == binomtest(sum(wins > 0.5), sum(wins != 0.5)).pvalue


def test_clipscore_is_the_cosine(clip):
    args = eval_win_rate.parse_args(
        ["--pretrained_model_name_or_path", "none", "--clipscore_model_name_or_path", str(clip)]
    )
    scorer = scorers.load_clipscore(args)
    image = Image.new("RGB", (40, 20), "red")
    inputs = scorer.processor(text=["a cat"], images=[image], return_tensors="pt")
    with torch.no_grad():
        text = scorer.model.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output
        picture = scorer.model.get_image_features(inputs.pixel_values).pooler_output
        expected = 100 * torch.nn.functional.cosine_similarity(text, picture).item()
        # Of a batch, whose prompts differ in length.
        assert scorer(["a cat", "a bird, asleep"], [image] * 2)[0].item() == pytest.approx(expected, abs=1e-3)


def test_pictures_are_decoded_once_for_all_scorers(evaluate, monkeypatch):
    decoded = []

    def note(data):
        decoded.append(data)
        return Image.open(io.BytesIO(data))

    monkeypatch.setattr(preference_pairs, "read_image", note)
    folder = evaluate("--scorers", "pickscore", "clipscore")
    paths = [*folder.glob("*/*.png"), folder / "model" / "00000.png", folder / "baseline" / "00000.png"]
    assert sorted(decoded) == sorted(path.read_bytes() for path in paths)


def test_half_precision_on_a_gpu(evaluate):
    args = eval_win_rate.parse_args(evaluate.command())
    for device, precision in (("cpu", "no"), ("cuda", "fp16"), ("mps", "fp16")):
        assert pictures.choose_precision(args, SimpleNamespace(device=torch.device(device))) == precision
    args.mixed_precision = "no"
    assert pictures.choose_precision(args, SimpleNamespace(device=torch.device("cuda"))) == "no"


def test_aesthetic_head(evaluate, clip, tmp_path):
    torch.manual_seed(0)
    sizes = {0: (12, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for number, (width, out) in sizes.items():
        state[f"layers.{number}.weight"] = torch.randn(out, width) / width**0.5
        state[f"layers.{number}.bias"] = torch.randn(out)
    torch.save(state, tmp_path / "head.pth")
    folder = evaluate("--scorers", "aesthetic", aesthetic_weights=tmp_path / "head.pth")
    row = next(csv.DictReader(open(folder / "scores.csv")))

    scorer = scorer_models.CLIPSimilarity(clip, clip)
    with torch.no_grad():
        _, x = scorer.embed([""], [Image.open(folder / "model" / "00000.png")])
        for number in sizes:
            x = x @ state[f"layers.{number}.weight"].mT + state[f"layers.{number}.bias"]
    assert float(row["aesthetic_model"]) == pytest.approx(x.item(), rel=1e-4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "scorer, message",
    [
        ("hpsv2", "HPS_v2.1_compressed.pt of xswu/HPSv2 cannot be downloaded: .*--hpsv2_weights"),
        ("imagereward", "ImageReward.pt of THUDM/ImageReward cannot be downloaded: .*--imagereward_weights"),
        ("aesthetic", "needs --aesthetic_weights"),
    ],
)
def test_scorers_that_are_not_there(evaluate, scorer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate("--scorers", scorer)
    assert [path.name for path in tmp_path.glob("evaluation/*")] == [".lock"], "nothing is drawn before"
