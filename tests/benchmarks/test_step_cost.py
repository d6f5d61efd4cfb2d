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

import pytest
import step_cost
import torch
from torch.utils.flop_counter import FlopCounterMode


SMALL = step_cost.MODELS["small"]
TINY_UNET = {**SMALL.unet, "block_out_channels": (8, 16, 16), "sample_size": 8, "transformer_layers_per_block": 1}
TINY = SMALL._replace(unet=TINY_UNET, resolution=64, rank=2)


# Counts are kept for the tests that follow, in one process.
pytestmark = pytest.mark.xdist_group("step_cost")


@functools.cache
def count(model, variant, gradient_checkpointing=False):
    configuration = TINY if model == "tiny" else step_cost.MODELS[model]
    return step_cost.count(configuration, step_cost.VARIANTS[variant], gradient_checkpointing)


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
    # At full size.
    flops = count(model, variant).flops
    latent_flops = {part: flops[part] for part in ("reference", "policy", "backward")}
    assert 1.2 < sum(flops.values()) / sum(latent_flops.values()) <= limit
    if model == "sd15":
        assert latent_flops == count(model, "latent DPO").flops, "the common parts cost the same"


def test_sdxl_fits_into_12_gb():
    assert 6e9 < step_cost.peak_memory(count("sdxl", "NCP-DPO", gradient_checkpointing=True)) <= 12e9


def test_the_current_timestep_costs_the_same():
    previous, current = (
        count("tiny", name).flops for name in ("NCP-DPO, one-sided", "NCP-DPO, one-sided, current timestep")
    )
    assert current == previous


@pytest.mark.parametrize("variant, forwards, encoders", [("NCP-DPO", 2, 2), ("NCP-CPO", 1, 1), ("NCP-SFT", 1, 1)])
def test_no_pass_too_many(variant, forwards, encoders):
    # Reference-free losses run no reference, and nothing past the mid block is computed for the features.
    step = step_cost.Step(TINY, step_cost.VARIANTS[variant], "meta")
    calls = Counter()
    for name in ("mid_block", "up_blocks.0", "up_blocks.2", "conv_out"):
        hook = functools.partial(lambda name, *args: calls.update([name]), name)
        step.policy.get_submodule(name).register_forward_hook(hook)
    with step_cost.metered(step, step_cost.Meter()):
        step.loss(step.denoising()).backward()
    assert calls == {
        "mid_block": forwards + encoders,
        "up_blocks.0": forwards,
        "up_blocks.2": forwards,
        "conv_out": forwards,
    }


def test_the_authors_way_holds_a_second_unet_and_encodes_every_batch():
    ours, theirs = (count("tiny", name) for name in ("NCP-DPO, one-sided", "NCP-DPO, the authors' way"))
    assert theirs.num_parameters["U-Nets"] == 2 * ours.num_parameters["U-Nets"]
    assert theirs.flops["VAE"] > 0 and theirs.flops["text"] > 0
    assert ours.flops["VAE"] == ours.flops["text"] == 0
    # Three passes of the encoder, one of them with a backward pass, either way.
    assert theirs.flops["anchor"] + theirs.flops["error"] == ours.flops["anchor"] + ours.flops["error"]


def test_meter_counts_what_flop_counter_mode_counts():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        x = torch.randn(2, 3, 8, 8)
    with step_cost.Meter() as meter, meter.part("all"):
        model(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert meter.flops["all"] == counter.get_total_flops() > 0


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
    assert meter.peak == {"first": 4000, "second": 8000}


def test_checkpointing_trades_memory_for_flops():
    plain, checkpointed = (count("tiny", "NCP-DPO, one-sided", value) for value in (False, True))
    assert sum(checkpointed.flops.values()) > sum(plain.flops.values())
    assert max(checkpointed.peak.values()) < 0.5 * max(plain.peak.values())


def test_timing_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step_cost.MODELS, "small", TINY)
    monkeypatch.setattr(step_cost, "WARM_UP_STEPS", 0)
    monkeypatch.delitem(step_cost.TIMED_VARIANTS, "NCP-DPO, --compile")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "results" / "cost.json"
    step_cost.main_time(step_cost.parse_args(["time", "--model", "small", "--steps", "1", "--json", str(file)]))

    report = json.loads(file.read_text())
    assert report["device"].startswith("CPU") and report["versions"]["torch"] == torch.__version__
    results = report["models"]["small × 1"]["results"]
    assert "NCP-DPO, one-sided" not in results, "in float32 this is what NCP-DPO is"
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
