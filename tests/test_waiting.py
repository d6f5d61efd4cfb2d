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

"""A step never waits for the device: it reads no value there, and copies the captions' tokens alone.

The models are on the meta device, where reading a value raises an error. The loss scaler of fp16 and --max_skipped_steps need a
value in every step, so they are left out. `Monitor.record` copies one table to the CPU, which the next step reads.
"""

import importlib

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from conftest import SCRIPTS, reset_accelerate
from preference_pairs import collate_fn, open_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CopyCounter(TorchDispatchMode):
    """Lists the operators with tensors of both devices. Numbers on the CPU travel with a kernel's launch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("loss_type", ["dpo", "cpo"])
@pytest.mark.parametrize("loss_space", ["ncp", "latent"])
def test_a_step_reads_nothing_from_the_device(run, monkeypatch, loss_space, loss_type):
    script = importlib.import_module(SCRIPTS[run.kind])
    args = script.parse_args(run.command([], {"--loss_space": loss_space, "--loss_type": loss_type}))
    noise_scheduler, vae_config, timesteps = script.check_checkpoint(args)
    pairs, _ = open_pairs(args, vae_config, timesteps, winner_only=False)
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    pipeline = script.load_pipeline(args, accelerator)
    for name in ("unet", "vae", *script.TEXT_ENCODERS):
        getattr(pipeline, name).to("meta")
    policy = script.create_policy(args, pipeline.unet, None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # The meta device has no autocast.
    optimizer, _ = script.create_optimizer(args, policy, 2)
    perception = script.create_perception(args, accelerator, pairs, policy, pipeline, noise_scheduler, None, {})
    batch = send_to_device(collate_fn([pairs[0, row] for row in pairs.rows[:2]]), torch.device("meta"))

    def step():
        denoising = script.noise_batch(args, batch, pipeline, noise_scheduler)
        needs_reference = script.ncp_loss.LOSSES[loss_type].needs_reference
        errors = perception.errors(denoising, *script.predict(denoising, policy, policy, needs_reference))
        script.measure_loss(args, errors, batch).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return script.tabulate(batch, errors)

    step()  # The noise scheduler moves its table to the device once.
    with CopyCounter() as copies:
        table = step()
    assert copies.found == ["aten._to_copy.default"] * len(script.TEXT_ENCODERS)
    assert all(column.is_meta for column in table.values())
    with pytest.raises((NotImplementedError, RuntimeError)):
        table["error_w"].mean().item()
