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

"""Past two processes: accelerate's configurations for many GPUs, and four processes for real."""

import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import ROOT, deviation, run_on_two_processes


@pytest.mark.parametrize(
    "name, machines, processes, address",
    [("8_gpus", 1, 8, None), ("2_machines", 2, 16, ("10.0.0.1", 29500))],
)
def test_accelerate_takes_its_configurations(name, machines, processes, address):
    # Of an unknown key it says so.
    config = load_config_from_file(str(ROOT / f"docs/accelerate/{name}.yaml"))
    assert config.distributed_type == DistributedType.MULTI_GPU and not config.use_cpu
    assert (config.num_machines, config.num_processes, config.machine_rank) == (machines, processes, 0)
    assert (config.main_process_ip, config.main_process_port) == (address or (None, None))
    assert config.mixed_precision == "bf16" and config.rdzv_backend == "static"


def test_four_processes_equal_one_with_their_batches_together(run_sd15, tmp_path):
    # 10 pairs, 4 a step: a step reaches into the second epoch. cpo, since its winners' error keeps the gradient from
    # being the small difference of large numbers that rounding decides.
    options = {"loss_type": "cpo", "loss_space": "latent", "beta_dpo": 100, "max_train_samples": 10}
    options = {"max_train_steps": 5, "checkpointing_steps": 3, **options}
    run_sd15(train_batch_size=4, **options)
    one, losses = run_sd15.lora(), run_sd15.scalars("loss")
    words = run_sd15.into("four").command(
        [], {f"--{name}": value for name, value in options.items()} | {"--train_batch_size": 1}
    )
    codes, log = run_on_two_processes("train_ncp_dpo_sd15.py", words, tmp_path / "log", number=4)
    assert codes == [0, 0, 0, 0], log
    # Means over all four, logged once.
    assert run_sd15.scalars("loss") == pytest.approx(losses, abs=1e-5)
    assert deviation(run_sd15.lora(), one) < 1e-3
    checkpoint = run_sd15.output_dir / "checkpoint-5"
    assert json.loads((checkpoint / "training_state.json").read_text())["num_processes"] == 4
