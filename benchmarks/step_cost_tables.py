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

"""Tables of what a step costs, from results that `step_cost.py` counted and `gpu.py` timed. `step_cost.py count` writes them."""

import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from doc_tables import write_table  # noqa: E402


COMMAND = "python benchmarks/step_cost.py count"
RESULTS = Path(__file__).with_name("results")
COUNTS, COUNT_PAGE, TIMINGS = (
    RESULTS / name for name in ("step_cost_count.jsonl", "step_cost_count.md", "gpu_time.json")
)
TITLES = {"sdxl": "SDXL, 1024²", "sd15": "SD 1.5, 512²"}
# Steps that a table compares, and what it calls them.
SAVED = {
    "NCP-DPO, PEFT's layers and both sides": "NCP-DPO, before",
    "NCP-DPO": "NCP-DPO",
    "NCP-CPO": "NCP-CPO",
    "measuring the error scale": "measuring the error scale",
}
PARTS = ("VAE", "text", "reference", "anchor", "policy", "error", "backward", "rest")
# The rows of README's table, and what it calls them.
SUMMARY = {
    "latent DPO": "latent DPO, encoded data",
    "latent DPO, VAE in the loop": "latent DPO, VAE in the loop",
    "NCP-DPO": "**NCP-DPO, encoded data**",
    "NCP-CPO": "NCP-CPO, encoded data",
    "NCP-DPO, the authors' way": "NCP-DPO with a second U-Net, VAE and text encoders in the loop",
}
# The rows of the tables of timings.
TIMED = {
    "latent DPO": "latent DPO",
    "latent DPO, VAE in the loop": "latent DPO, VAE in the loop",
    "NCP-DPO": "NCP-DPO",
    **{
        f"{name}, {flags}": f"{name}, `{flags}`"
        for flags in ("--channels_last", "--compile", "--channels_last --compile")
        for name in ("latent DPO", "NCP-DPO")
    },
    "latent DPO, up blocks not checkpointed": "latent DPO, up blocks not checkpointed",
    "NCP-DPO, up blocks not checkpointed": "NCP-DPO, up blocks not checkpointed",
    "latent DPO, PEFT's layers": "latent DPO, PEFT's layers",
    "NCP-DPO, both sides": "NCP-DPO, both sides",
    "NCP-DPO, PEFT's layers and both sides": "NCP-DPO, PEFT's layers and both sides",
    "NCP-DPO, AdamW in 32 bits": "NCP-DPO, AdamW in 32 bits",
    "NCP-DPO, one-sided": "NCP-DPO, one-sided",
    "NCP-CPO": "NCP-CPO",
    "NCP-SFT": "NCP-SFT (of winners)",
    "NCP-DPO, the authors' way": "NCP-DPO, the authors' way",
}
# Marks of machines other than the first, by the end of their names in the results.
MARKS = {"": "", "another machine": "\\*", "a third machine": "\\*\\*"}


def load_counts(path=COUNTS):
    """The settings of the count, and its steps by (model, pairs per step, name), with "model on a CPU" for a CPU's kernels."""
    settings, *steps = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    counts = {}
    for step in steps:
        model = step["model"] + (" on a CPU" if step["device"] == "cpu" else "")
        counts[model, step["batch_size"], step["name"]] = step
    return settings, counts


def load_timings(path=TIMINGS):
    """By "MODEL × PAIRS" and, where it is not the first, the machine: what was timed."""
    return json.loads(path.read_text(encoding="utf-8"))["models"]


def table(header, rows):
    """A Markdown table, its first column left-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# Counts


def plain_flops(part):
    """FLOPs without those of gradient checkpointing."""
    return part["flops"] - part["recomputed_flops"]


def step_flops(step):
    """FLOPs of a step without and with gradient checkpointing."""
    parts = step["parts"].values()
    return sum(map(plain_flops, parts)), sum(part["flops"] for part in parts)


def forward_flops(counts, model):
    """F: FLOPs of one forward pass of the U-Net without its LoRA, for one image."""
    step = counts[model, 1, "latent DPO"]
    return step["parts"]["reference"]["flops"] / step["num_images"]


def parts_table(counts, model):
    """FLOPs of what steps consist of, for one image (text encoders: for one prompt)."""
    latent, one_sided = (
        {name: plain_flops(part) for name, part in counts[model, 1, step]["parts"].items()}
        for step in ("latent DPO, VAE in the loop", "NCP-DPO, one-sided")
    )
    parts = {
        "U-Net forward (F)": latent["reference"] / 2,
        "policy forward (U-Net with LoRA)": latent["policy"] / 2,
        "policy backward": latent["backward"] / 2,
        "encoder forward (down and mid blocks)": one_sided["anchor"] / 4,
        "encoder forward and input-backward": one_sided["error"] / 2,
        "VAE encode": latent["VAE"] / 2,
        "text encoders, per prompt": latent["text"],
    }
    forward = forward_flops(counts, model)
    rows = [[name, f"{flops / 1e12:.2f}", f"{flops / forward:.2f}"] for name, flops in parts.items()]
    return table(["part, for one image", "TFLOP", "F"], rows)


def flops_table(counts, model):
    """FLOPs of steps and of their parts, in multiples of F per image."""
    columns = [part for part in PARTS if part != "rest"]
    latent, latent_checkpointed = step_flops(counts[model, 1, "latent DPO"])
    rows = []
    for name, step in steps_of(counts, model, 1).items():
        unit = forward_flops(counts, model) * step["num_images"]
        total, checkpointed = step_flops(step)
        parts = [plain_flops(step["parts"][part]) / unit if part in step["parts"] else 0 for part in columns]
        rows.append(
            [name]
            + [f"{flops:.2f}" if flops else "" for flops in parts]
            + [f"**{total / unit:.2f}**", f"{total / latent:.2f}"]
            + [f"{checkpointed / unit:.2f}", f"{checkpointed / latent_checkpointed:.2f}"]
            + [f"{sum(step['num_parameters'].values()) / 1e9:.2f}"]
        )
    totals = ["**all**", "× latent DPO", "checkpointed", "× latent DPO", "parameters, 10⁹"]
    return table(["step, F per image", *columns, *totals], rows)


def steps_of(counts, model, batch_size):
    return {name: step for (m, b, name), step in counts.items() if (m, b) == (model, batch_size)}


def held_memory(step):
    """Bytes of parameters and optimizer state, by arithmetic."""
    num_parameters = step["num_parameters"]
    return {
        "U-Nets": 2 * num_parameters["U-Nets"],
        "VAE, text encoders": step["vae_itemsize"] * num_parameters["VAE"] + 2 * num_parameters["text"],
        "LoRA": 4 * num_parameters["LoRA"],
        # Two moments of 8 bits, and a float32 scale per 256 of either.
        "Adam": 2 * (1 + 4 / 256) * num_parameters["LoRA"],
    }


def peak_memory(step):
    """Bytes at the most expensive moment of a step."""
    return sum(held_memory(step).values()) + max(part["peak_bytes"] for part in step["parts"].values())


def memory_table(counts, model):
    """Peak memory of a step of one pair in GB."""
    columns = [part for part in PARTS if part not in ("text", "rest")]
    rows = []
    for name, step in steps_of(counts, model, 1).items():
        held = held_memory(step)
        peaks = [step["parts"][part]["peak_bytes"] if part in step["parts"] else 0 for part in columns]
        rows.append(
            [name, *(f"{size / 1e9:.2f}" if size else "" for size in [*held.values(), *peaks])]
            + [f"**{peak_memory(step) / 1e9:.1f}**"]
        )
    return table(["GB", *held, *columns, "**peak**"], rows)


# Floors


def describe_largest(part):
    names = (
        (name.replace("bfloat16", "bf16").replace("float32", "fp32"), num_bytes, kernels)
        for name, num_bytes, kernels in part["largest"]
    )
    return "; ".join(f"`{name}` {num_bytes / 1e9:.3g} ({kernels:,})" for name, num_bytes, kernels in names)


def floor_table(counts, timings, model, batch_size):
    """The least time of the parts of NCP-DPO on an H100, and the measured time of the step."""
    steps = steps_of(counts, model, batch_size)
    looped = steps["latent DPO, VAE in the loop"]["parts"]
    parts = {f"{name}, if in the loop": looped[name] for name in ("VAE", "text")}
    parts |= {name: steps["NCP-DPO"]["parts"][name] for name in PARTS if name in steps["NCP-DPO"]["parts"]}
    rows = [[name, *floor_cells([part]), describe_largest(part)] for name, part in parts.items()]
    rows.append(["**NCP-DPO**", *floor_cells(steps["NCP-DPO"]["parts"].values()), ""])
    if (timing := find_timing(timings, model, batch_size, "NCP-DPO")[0]) is not None:
        rows.append(["measured", "", "", "", f"{timing['seconds_per_step']:.2f}", ""])
    header = ["part", "TFLOP", "GB", "kernels", "floor, s", "largest by GB (kernels)"]
    return table([f"{header[0]}, {describe_pairs(batch_size)}", *header[1:]], rows)


def floor_cells(parts):
    flops, num_bytes, kernels, seconds = (
        sum(part[key] for part in parts) for key in ("flops", "bytes", "kernels", "floor_seconds")
    )
    return [f"{flops / 1e12:.2f}", f"{num_bytes / 1e9:,.1f}", f"{kernels:,}", f"{seconds:.3f}"]


def floors_table(counts, timings, model, batch_size):
    """The least time of all steps on an H100, beside the measured time."""
    rows = []
    for name, step in steps_of(counts, model, batch_size).items():
        *numbers, floor = floor_cells(step["parts"].values())
        timing, mark = find_timing(timings, model, batch_size, name)
        measured = [f"{timing['seconds_per_step']:.2f}{mark}"] if timing else ["not measured"]
        rows.append([name, *numbers, floor, *measured])
    text = table([f"step, {describe_pairs(batch_size)}", "TFLOP", "GB", "kernels", "floor, s", "measured, s"], rows)
    return with_notes(text, machine_notes(timings, model, batch_size, steps_of(counts, model, batch_size)))


def saved_table(counts):
    """What SDXL's steps cost before and after the LoRA layers and the gradient's side were changed."""
    rows = []
    for name, title in SAVED.items():
        one, eight = (counts["sdxl", size, name] for size in (1, 8))
        flops = step_flops(one)[0] / one["num_images"] / forward_flops(counts, "sdxl")
        _, *cells = floor_cells(eight["parts"].values())
        rows.append([title, f"{flops:.2f}", f"{peak_memory(one) / 1e9:.1f}", *cells])
    return table([TITLES["sdxl"], "F per image", "peak GB, 1 pair", "GB moved, 8 pairs", "kernels", "floor, s"], rows)


def layers_table(counts):
    """Kernels and bytes of SDXL's policy with three kinds of LoRA layers, with the kernels of a CPU and of a GPU."""
    steps = steps_of(counts, "sdxl on a CPU", 8)
    for name, title in {
        "NCP-DPO, PEFT's layers and both sides": "PEFT's layers",
        "NCP-DPO": "the scripts' layers",
    }.items():
        steps[f"{title}, a GPU's kernels"] = counts["sdxl", 8, name]
    rows = []
    for name, step in steps.items():
        _, num_bytes, kernels, _ = floor_cells([step["parts"][part] for part in ("policy", "backward")])
        rows.append([name, kernels, num_bytes])
    return table(["SDXL's policy, forward and backward, 16 images, a CPU's kernels", "kernels", "GB moved"], rows)


def describe_pairs(batch_size):
    return "1 pair" if batch_size == 1 else f"{batch_size} pairs"


# Timings


def find_timing(timings, model, batch_size, name):
    """What was timed of a step, on the first machine that timed it, and the mark of this machine."""
    for key, part in timings.items():
        run, _, machine = key.partition(", ")
        if run == f"{model} × {batch_size}" and "seconds_per_step" in part["results"].get(name, {}):
            return part["results"][name], MARKS[machine]
    return None, ""


def show_rate(rate):
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def machine_notes(timings, model, batch_size, names):
    """What the marks of these steps mean, with what these machines make of the usual steps."""
    used = {find_timing(timings, model, batch_size, name)[1] for name in names}
    notes = []
    for machine, mark in MARKS.items():
        if mark and mark in used:
            results = timings[f"{model} × {batch_size}, {machine}"]["results"]
            rates = [
                f"{name} makes {show_rate(results[name]['pairs_per_second'])} pairs per second"
                for name in ("latent DPO", "NCP-DPO")
                if name in results
            ]
            notes.append(f"{mark}: on {machine}, where {' and '.join(rates)}.")
    return notes


def with_notes(text, notes):
    return f"{text}\n\n{' '.join(notes)}" if notes else text


def timing_table(timings, model, batch_sizes):
    """Pairs per second, peak memory and MFU by pairs per step; ratios are of the last."""
    last = batch_sizes[-1]
    baseline = find_timing(timings, model, last, "latent DPO")[0]["pairs_per_second"]
    header, rows = [TITLES[model]], []
    for batch_size in batch_sizes:
        header += [f"{describe_pairs(batch_size)} per step", *["× latent DPO"] * (batch_size == last), "GB", "MFU"]
    for name, title in TIMED.items():
        cells = []
        for batch_size in batch_sizes:
            timing, mark = find_timing(timings, model, batch_size, name)
            if timing is None:
                cells += [""] * (4 if batch_size == last else 3)
                continue
            rate = timing["pairs_per_second"]
            cells += [show_rate(rate) + mark, *[f"{rate / baseline:.2f}"] * (batch_size == last)]
            cells += [f"{timing['peak_memory_gb']:.1f}", f"{timing['mfu']:.1%}"]
        if any(cells):
            rows.append([title, *cells])
    text = table(header, rows)
    notes = [note for size in batch_sizes for note in machine_notes(timings, model, size, TIMED)]
    return with_notes(text, notes)


def summary_table(counts, timings):
    """README's table: FLOPs per image of both models, and what was measured with 8 pairs per step and with one."""
    header = ["", TITLES["sdxl"], "pairs/s", "GB", "GB, one pair", TITLES["sd15"], "pairs/s", "GB"]
    rows = []
    for name, title in SUMMARY.items():
        row = [title]
        for model in ("sdxl", "sd15"):
            step = counts[model, 1, name]
            row.append(f"{step_flops(step)[0] / step['num_images'] / forward_flops(counts, model):.2f} F")
            timing, mark = find_timing(timings, model, 8, name)
            row += [show_rate(timing["pairs_per_second"]) + mark, f"{timing['peak_memory_gb']:.1f}"]
            if model == "sdxl":
                row.append(f"{find_timing(timings, model, 1, name)[0]['peak_memory_gb']:.1f}")
        rows.append(row)
    text = table(header, rows)
    sizes = [f"{forward_flops(counts, model) / 1e12:.2f}" for model in ("sdxl", "sd15")]
    notes = [f"F is {sizes[0]} TFLOP for SDXL and {sizes[1]} TFLOP for SD 1.5."]
    notes += [note for model in ("sdxl", "sd15") for note in machine_notes(timings, model, 8, SUMMARY)]
    return with_notes(text, notes)


# Pages


COUNT_TEXT = """# What an optimization step costs, counted

Written by `{command}`, with {versions}. The models have their full size and consist of
fake tensors, so the count needs no weights and no GPU. bf16 and a LoRA of rank {rank} on the attention projections; a pair is two
images, and for SFT one. FLOPs are those of `torch.utils.flop_counter`: matrix products,
convolutions and attention (its backward pass with what flash attention computes again). Differences are central, or one-sided
where it says so (`--ncp_probe_rms 0`; fp32 takes them by default). "PEFT's layers and both sides" is a step as it was before LoRA layers were fused
and before the gradient was taken at one side; measuring the error scale has no gradient. "Checkpointed" is with gradient checkpointing, and
"× latent DPO" compares whole steps. With the current timestep (`target_timestep="current"`) a step costs the same.

Parts: VAE and text encoders; *reference*, the U-Net without its LoRA; *anchor*, the encoder on the target and the
reference's prediction without gradient (in the authors' way on the target only); *policy*, its forward pass; *error*, the encoder
on the policy's prediction, forward and backward (in the authors' way on the reference's, too); *backward*, the policy's;
*rest*, noise, loss and what else lies between.
"""
MEMORY_TEXT = """Peak memory for one pair with gradient checkpointing, 8-bit Adam and, unless a VAE is shown, encoded latents and text
embeddings. Parameters and optimizer state by arithmetic: frozen weights at 2 bytes (SDXL's VAE at 4), the LoRA at 4, Adam's
state at 2.03. For the rest, the bytes of all tensors made since the step began that are alive at a time (activations, gradients,
operations' results, autocast's copies), attention without its N x N matrix; the most in each part of the step. Not in it: the
workspaces of kernels, the CUDA context, the allocator's fragmentation."""
FLOOR_TEXT = """The floor of an H100, with gradient checkpointing: each kernel takes as long as its FLOPs at {tflops:.0f} TFLOP/s or its bytes at
{terabytes} TB/s, whichever is longer, and a part takes at least {microseconds:.0f} µs per kernel, for the launches. Bytes are what all kernels
but views read and write, as if no cache kept them. Clipping and the optimizer are not in it. Items are an operation, the dtype of
its result and the class of the module that runs it; gradients have no module."""


def floor_text(settings):
    return FLOOR_TEXT.format(
        tflops=settings["flops_per_second"] / 1e12,
        terabytes=settings["bytes_per_second"] / 1e12,
        microseconds=settings["launch_seconds"] * 1e6,
    )


def count_page(settings, counts, timings):
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    blocks = [COUNT_TEXT.format(command=COMMAND, versions=versions, rank=settings["rank"])]
    for model, title in TITLES.items():
        batch_sizes = sorted({size for name, size, _ in counts if name == model})
        timed = [size for size in batch_sizes if find_timing(timings, model, size, "NCP-DPO")[0]]
        blocks += [f"## {title}", parts_table(counts, model), flops_table(counts, model)]
        blocks += [MEMORY_TEXT, memory_table(counts, model), floor_text(settings)]
        blocks += [floor_table(counts, timings, model, size) for size in timed]
        blocks += [floors_table(counts, timings, model, size) for size in timed]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def document_tables(settings, counts, timings):
    """The tables of the Markdown files outside this folder, by file and name."""
    page = ROOT / "docs" / "results.md"
    floors = [
        floor_table(counts, timings, "sdxl", 8),
        *(floors_table(counts, timings, "sdxl", size) for size in (8, 1)),
    ]
    return {
        (ROOT / "README.md", "step-cost"): summary_table(counts, timings),
        (page, "step-cost-full"): "\n\n".join(
            [timing_table(timings, "sdxl", (1, 8)), timing_table(timings, "sd15", (8, 32))]
        ),
        (page, "step-cost-floor"): "\n\n".join([floor_text(settings), *floors]),
        (page, "step-cost-saved"): "\n\n".join([saved_table(counts), layers_table(counts)]),
    }


def write_tables():
    """Writes all tables anew from the results."""
    settings, counts = load_counts()
    timings = load_timings()
    COUNT_PAGE.write_text(count_page(settings, counts, timings), encoding="utf-8")
    for (file, name), text in document_tables(settings, counts, timings).items():
        write_table(file, name, COMMAND, text)
