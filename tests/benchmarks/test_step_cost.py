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

import functools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import step_cost
import step_cost_tables
import torch
import torch.nn.functional as F
from conftest import ROOT
from doc_tables import write_table
from torch.utils.flop_counter import FlopCounterMode


SMALL = step_cost.MODELS["small"]
TINY_UNET = {**SMALL.unet, "block_out_channels": (8, 16, 16), "sample_size": 8, "transformer_layers_per_block": 1}
TINY_UNET["layers_per_block"] = 1
TINY = SMALL._replace(unet=TINY_UNET, resolution=64, rank=2)
SETTINGS, COUNTS = step_cost_tables.load_counts()
TIMINGS = step_cost_tables.load_timings()


# Counts are kept for the tests that follow, in one process.
pytestmark = pytest.mark.xdist_group("step_cost")


@functools.cache
def count(model, variant, gradient_checkpointing=False):
    configuration = TINY if model == "tiny" else step_cost.MODELS[model]
    return step_cost.count(configuration, step_cost.VARIANTS[variant], 1, gradient_checkpointing)


def flops(step):
    return {name: part["flops"] for name, part in step["parts"].items() if part["flops"]}


@pytest.mark.parametrize("model", ["sdxl", "sd15"])
def test_results_are_of_this_code(model):
    # At full size. Another version of PyTorch may run a few kernels more or less.
    counted, kept = count(model, "NCP-DPO", True), COUNTS[model, 1, "NCP-DPO"]
    hint = f"run {step_cost_tables.COMMAND}"
    assert flops(counted) == flops(kept), hint
    assert counted["num_parameters"] == kept["num_parameters"], hint
    for name, part in counted["parts"].items():
        for key in ("bytes", "kernels", "floor_seconds", "peak_bytes"):
            assert part[key] == pytest.approx(kept["parts"][name][key], rel=0.01), f"{name} {key}: {hint}"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_documents_hold_the_tables(page):
    held = {
        name: write_table(file, name, step_cost_tables.COMMAND, text, check=True)
        for (file, name), text in step_cost_tables.document_tables(SETTINGS, COUNTS, TIMINGS).items()
        if file == ROOT / page
    }
    assert held and all(held.values()), f"run {step_cost_tables.COMMAND}: {held}"


def test_the_page_of_counts_is_of_the_results():
    assert step_cost_tables.COUNT_PAGE.read_text() == step_cost_tables.count_page(SETTINGS, COUNTS, TIMINGS)


@pytest.mark.parametrize(
    "model, variant, limit",
    [
        ("sd15", "NCP-DPO, one-sided", 1.48),
        ("sd15", "NCP-DPO", 1.73),
        ("sdxl", "NCP-DPO, one-sided", 1.62),
        ("sdxl", "NCP-DPO", 1.92),
    ],
)
def test_cost_relative_to_latent_dpo(model, variant, limit):
    ours, latent = (step_cost_tables.step_flops(COUNTS[model, 1, name])[0] for name in (variant, "latent DPO"))
    assert 1.2 < ours / latent <= limit


def test_sdxl_costs_no_more_than_aimed_at():
    forward = step_cost_tables.forward_flops(COUNTS, "sdxl")
    for name, limit in {"NCP-DPO": 5.46, "NCP-CPO": 3.60, "measuring the error scale": 3.9}.items():
        step = COUNTS["sdxl", 1, name]
        assert step_cost_tables.step_flops(step)[0] / step["num_images"] / forward <= limit, name
    before, now = (
        step_cost_tables.peak_memory(COUNTS["sdxl", 1, name])
        for name in ("NCP-DPO, PEFT's layers and both sides", "NCP-DPO")
    )
    assert now < before < 8e9
    parts = COUNTS["sdxl on a CPU", 8, "the scripts' layers"]["parts"]
    policy = [parts["policy"], parts["backward"]]
    assert sum(part["kernels"] for part in policy) <= 14300 and sum(part["bytes"] for part in policy) <= 1310e9


def test_both_sides_have_nearly_the_gradient_of_one():
    torch.manual_seed(0)
    step = step_cost.Step(TINY, step_cost.Variant(), "cpu")
    both = step_cost.Step(TINY, step_cost.Variant(both_sides=True), "cpu", policy=step.policy).perception
    step.batch["timesteps"][:] = 500
    denoising = step.denoising()
    model_pred, ref_pred = (torch.randn(step.batch["latents"].shape) for _ in range(2))
    gradients = []
    for perception in (step.perception, both):
        pred = model_pred.clone().requires_grad_()
        perception.errors(denoising, pred, ref_pred).policy.sum().backward()
        gradients.append(pred.grad)
    assert F.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.95
    assert gradients[1].norm() == pytest.approx(gradients[0].norm(), rel=0.25)


def test_sdxl_fits_into_12_gb():
    assert 6e9 < step_cost_tables.peak_memory(COUNTS["sdxl", 1, "NCP-DPO"]) <= 12e9


def test_cost_grows_with_the_batch():
    one, eight = (COUNTS["sdxl", size, "NCP-DPO"]["parts"]["policy"] for size in (1, 8))
    assert eight["flops"] == 8 * one["flops"] and eight["kernels"] == one["kernels"]
    # Weights are read once.
    assert 4 * one["bytes"] < eight["bytes"] < 8 * one["bytes"]


def test_the_current_timestep_costs_the_same():
    previous, current = (
        count("tiny", name) for name in ("NCP-DPO, one-sided", "NCP-DPO, one-sided, current timestep")
    )
    assert flops(current) == flops(previous)


@pytest.mark.parametrize("variant, forwards, encoders", [("NCP-DPO", 2, 3), ("NCP-CPO", 1, 2), ("NCP-SFT", 1, 2)])
def test_no_pass_too_many(variant, forwards, encoders):
    # Reference-free losses run no reference, and nothing past the mid block is computed for the features. The policy's
    # two sides are two passes, since only one has a gradient.
    step = step_cost.create_fake_step(TINY, step_cost.VARIANTS[variant])
    calls = Counter()
    for name in ("mid_block", "up_blocks.0", "up_blocks.2", "conv_out"):
        hook = functools.partial(lambda name, *args: calls.update([name]), name)
        step.policy.get_submodule(name).register_forward_hook(hook)
    with step_cost.FAKE, step_cost.metered(step, step_cost.Meter()):
        step.loss(step.denoising()).backward()
    assert calls == {
        "mid_block": forwards + encoders,
        "up_blocks.0": forwards,
        "up_blocks.2": forwards,
        "conv_out": forwards,
    }


def test_the_authors_way_holds_a_second_unet_and_encodes_every_batch():
    ours, theirs = (count("tiny", name) for name in ("NCP-DPO, one-sided", "NCP-DPO, the authors' way"))
    assert theirs["num_parameters"]["U-Nets"] == 2 * ours["num_parameters"]["U-Nets"]
    ours, theirs = flops(ours), flops(theirs)
    assert theirs.keys() - ours.keys() == {"VAE", "text"}
    # Three passes of the encoder, one of them with a backward pass, either way.
    assert theirs["anchor"] + theirs["error"] == ours["anchor"] + ours["error"]


def test_the_policy_is_the_scripts(monkeypatch):
    script = step_cost.importlib.import_module(TINY.script)
    create_policy = script.create_policy

    def create_larger_policy(args, *rest):
        args.rank *= 2
        return create_policy(args, *rest)

    before = count("tiny", "latent DPO")
    monkeypatch.setattr(script, "create_policy", create_larger_policy)
    after = step_cost.count(TINY, step_cost.VARIANTS["latent DPO"])
    assert after["num_parameters"]["LoRA"] == 2 * before["num_parameters"]["LoRA"]
    for key in ("flops", "bytes"):
        assert after["parts"]["policy"][key] > before["parts"]["policy"][key]


def test_meter_counts_what_flop_counter_mode_counts():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        x = torch.randn(2, 3, 8, 8)
    with step_cost.Meter() as meter, meter.part("all"):
        model(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert meter.parts["all"].flops == counter.get_total_flops() > 0


def test_meter_knows_what_is_alive():
    x = torch.empty(1000, device="meta")
    with step_cost.Meter() as meter, meter.part("first"):
        y = x + 1
        z = y.view(10, 100).t()
        z.mul_(2)
        assert meter.live == 4000
        del y
        assert meter.live == 4000
        del z
        assert meter.live == 0
        with meter.part("second"):
            x.view(10, 100).double()
            x.exp()
    assert {name: part.peak for name, part in meter.parts.items()} == {"first": 4000, "second": 8000}


def test_meter_counts_bytes_and_kernels():
    linear, x = torch.nn.Linear(1000, 500, bias=False, device="meta"), torch.empty(1, 1000, device="meta")
    meter = step_cost.Meter()
    with meter.modules_followed(), meter, meter.part("all"):
        torch.empty(7, device="meta")
        y = linear(x).view(500).unsqueeze(0)
        y.mul_(2)
    part = meter.parts["all"]
    # Views and an allocation are no kernels. The second one writes what it reads.
    product, factor = 4 * (1000 + 500 * 1000 + 500), 4 * 2 * 500
    assert part.items == {"mm float32 in torch Linear": (product, 1), "mul float32": (factor, 1)}
    assert (part.num_kernels, part.num_bytes) == (2, product + factor)
    counted = part.to_dict()
    assert [name for name, *_ in counted["largest"]] == ["mm float32 in torch Linear", "mul float32"]
    assert part.device_seconds == pytest.approx((product + factor) / 3.35e12)
    assert counted["floor_seconds"] == 1e-5, "the launches take longer"


def test_a_kernel_is_as_slow_as_its_flops_or_its_bytes():
    part = step_cost.Part()
    part.add_kernel("matrix product", 989e12, 1)
    part.add_kernel("copy", 0, 3.35e12)
    assert part.device_seconds == pytest.approx(2)


def test_norms_run_in_float32_in_autocast():
    norm, x = step_cost.in_float32(F.layer_norm), torch.randn(2, 4, dtype=torch.bfloat16)
    assert norm(x, (4,)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x, (4,)).dtype == torch.float32


def test_checkpointing_trades_memory_for_flops():
    plain, checkpointed = (count("tiny", "NCP-DPO", value) for value in (False, True))
    assert (
        step_cost_tables.step_flops(checkpointed)[0] == sum(flops(plain).values()) < sum(flops(checkpointed).values())
    )
    peaks = [max(part["peak_bytes"] for part in step["parts"].values()) for step in (plain, checkpointed)]
    assert peaks[1] < 0.5 * peaks[0]


def test_machines_have_marks():
    result = {"seconds_per_step": 1.0, "pairs_per_second": 1.0, "peak_memory_gb": 2.0, "mfu": 0.5}
    timings = {
        "sdxl × 1": {"results": {"latent DPO": result, "NCP-DPO": {"skipped": "out of memory"}}},
        "sdxl × 1, another machine": {"results": {"NCP-DPO": {**result, "pairs_per_second": 12.34}}},
    }
    text = step_cost_tables.timing_table(timings, "sdxl", (1,))
    assert "| latent DPO | 1.00 | 1.00 | 2.0 | 50.0% |" in text
    assert "| NCP-DPO | 12.3\\* | 12.34 | 2.0 | 50.0% |" in text
    assert text.endswith("\\*: on another machine, where NCP-DPO makes 12.3 pairs per second.")


def test_timing_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step_cost.MODELS, "small", TINY)
    monkeypatch.setattr(step_cost, "WARM_UP_STEPS", 0)
    variants = {**step_cost.VARIANTS, "NCP-DPO, --channels_last": step_cost.TIMED_VARIANTS["NCP-DPO, --channels_last"]}
    names = ["latent DPO, VAE in the loop", "NCP-DPO", "NCP-DPO, one-sided", "NCP-DPO, the authors' way"]
    names += ["NCP-DPO, --channels_last", "NCP-DPO, PEFT's layers and both sides"]
    monkeypatch.setattr(step_cost, "TIMED_VARIANTS", {name: variants[name] for name in names})
    # Processes of their own would import everything, and count the larger model.
    monkeypatch.setattr(
        step_cost.concurrent.futures, "ProcessPoolExecutor", lambda mp_context: ThreadPoolExecutor(max_workers=1)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "results" / "cost.json"
    step_cost.main_time(step_cost.parse_args(["time", "--model", "small", "--steps", "1", "--json", str(file)]))

    report = json.loads(file.read_text())
    assert report["device"].startswith("CPU") and report["versions"]["torch"] == torch.__version__
    results = report["models"]["small × 1"]["results"]
    assert "NCP-DPO, --channels_last" in results
    assert "NCP-DPO, one-sided" not in results, "in float32 this is what NCP-DPO is"
    assert "NCP-DPO, PEFT's layers and both sides" not in results
    output = capsys.readouterr().out
    for name, result in results.items():
        assert result["pairs_per_second"] > 0 and 0 < result["mfu"] < 1
        assert name in output
    for name in ("NCP-DPO, the authors' way", "latent DPO, VAE in the loop"):
        assert f"times the pairs per second of: {name}" in output


def test_a_full_size_model_is_not_timed_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="GPU"):
        step_cost.main_time(step_cost.parse_args(["time", "--model", "sdxl", "sd15"]))


def test_choices_are_timed_first_with_as_few_policies_as_possible(monkeypatch):
    timed, policies = [], []

    def create_step(model, variant, device, batch_size, gradient_checkpointing):
        policies.append(variant)
        return SimpleNamespace(policy=variant)

    def time_together(variants, model, batch_size, device, args, policy):
        ((name, variant),) = variants.items()
        for key in ("flags", "lora_layer", "up_blocks_checkpointed"):
            assert getattr(policy, key) == getattr(variant, key)
        timed.append((model, batch_size, name))
        return {name: {}}

    monkeypatch.setattr(step_cost, "Step", create_step)
    monkeypatch.setattr(step_cost, "time_together", time_together)
    monkeypatch.setattr(step_cost.importlib.util, "find_spec", lambda name: True)
    args = step_cost.parse_args(["time", "--model", "sdxl", "sd15"])
    yielded = [(model, size, *results) for model, size, results in step_cost.time_models("cuda", args)]
    assert yielded[: len(step_cost.CHOICES)] == [("sdxl", 8, name) for name in step_cost.CHOICES]
    assert {name for _, _, name in yielded} == set(step_cost.TIMED_VARIANTS) and len(timed) == len(yielded)
    # Six for the choices, and for each model a plain one and a compiled one.
    assert len(policies) == 6 + 2 * 2
