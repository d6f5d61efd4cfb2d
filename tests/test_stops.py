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

"""Whatever stops a run, it ends with a checkpoint at the next batch, on all of its processes."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import train_ncp_dpo_sd15
from conftest import ROOT, deviation, free_port, start_script, start_two_processes


TRAINER = "train_ncp_dpo_sd15.py"
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TORCHRUN = ["torch.distributed.run", "--master_addr", "127.0.0.1"]


def command(run, **options):
    options = {"loss_space": "latent", "max_train_steps": 4000, "checkpointing_steps": 4000, **options}
    return run.command([], {f"--{name}": value for name, value in options.items()})


def launch(module, words, log, **environment):
    """A launcher in a session of its own."""
    words = [sys.executable, "-m", *module, str(ROOT / TRAINER), *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True, "env": environment}
        return subprocess.Popen(words, **options)


def wait_for_steps(log, number=3):
    deadline = time.monotonic() + 300
    while not any(int(step) >= number for step in re.findall(r" (\d+)/4000", log.read_text())):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def stopped_step(run):
    (checkpoint,) = run.output_dir.glob("*checkpoint-*")
    return json.loads((checkpoint / "training_state.json").read_text())["global_step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_the_trainer(run_sd15, tmp_path, number):
    log = tmp_path / "log"
    process = start_script(TRAINER, command(run_sd15, gradient_accumulation_steps=50), log)
    wait_for_steps(log, 1)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number, log.read_text()
    assert "Stopping after this batch" in log.read_text()
    assert f"Stopped by {number.name}" in log.read_text()
    state = run_sd15.state(f"checkpoint-{stopped_step(run_sd15)}")
    # It stops within an accumulated step. The gradients of the unfinished one are dropped.
    assert state["next_pair"] == state["global_step"] * 100


def test_a_signal_that_is_ignored_stays_ignored(run_sd15, tmp_path):
    log = tmp_path / "log"
    options = {"max_train_steps": 30, "checkpointing_steps": 30}
    words = ["nohup", sys.executable, str(ROOT / TRAINER), *command(run_sd15, **options)]
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    while not re.search(r" [3-9]/30", log.read_text()):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert (run_sd15.output_dir / "checkpoint-30").is_dir()


# torchrun has one handler for all signals. The launcher of accelerate for one process has none.
@pytest.mark.parametrize("num_trainers, number", [(1, signal.SIGTERM), (2, signal.SIGINT), (2, signal.SIGKILL)])
def test_a_signal_to_the_launcher(run_sd15, tmp_path, num_trainers, number):
    log = tmp_path / "log"
    torchrun = [*TORCHRUN, "--master_port", free_port(), "--nproc_per_node", "2"]
    process = launch(ACCELERATE if num_trainers == 1 else torchrun, command(run_sd15), log)
    wait_for_steps(log)
    children = psutil.Process(process.pid).children()
    trainers = [child for child in children if TRAINER in " ".join(child.cmdline())]
    assert len(trainers) == num_trainers
    process.send_signal(number)
    _, alive = psutil.wait_procs([psutil.Process(process.pid), *trainers], timeout=30)
    assert not alive, log.read_text()
    assert stopped_step(run_sd15) >= 3
    assert "Stopping after this batch" in log.read_text()


def test_a_machine_that_vanishes_ends_the_run_on_the_other(run_sd15, tmp_path):
    torchrun, logs = [*TORCHRUN, "--nnodes", "2", "--master_port", free_port()], [tmp_path / "0", tmp_path / "1"]
    words = command(run_sd15, ddp_timeout=20)
    machines = [launch([*torchrun, "--node_rank", str(rank)], words, log) for rank, log in enumerate(logs)]
    wait_for_steps(logs[0])
    for process in [*psutil.Process(machines[1].pid).children(recursive=True), machines[1]]:
        process.kill()
    assert machines[0].wait(30) != 0


def test_torchrun_starts_again_what_died(run_sd15, tmp_path):
    options = {"loss_type": "cpo", "beta_dpo": 100, "max_train_steps": 30, "checkpointing_steps": 10}
    run_sd15(loss_space="latent", train_batch_size=4, **options)
    undisturbed = run_sd15.lora()
    options |= {"dataloader_num_workers": 1, "resume_from_checkpoint": "latest"}
    words = command(run_sd15.into("restarted"), **options)
    torchrun, log = [*TORCHRUN[:1], "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"], tmp_path / "log"
    process = launch(torchrun, words, log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    while not (run_sd15.output_dir / "checkpoint-10").is_dir():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    # The one that holds the folder's lock.
    trainers = psutil.Process(process.pid).children()
    next(trainer for trainer in trainers if trainer.environ()["RANK"] == "0").kill()
    assert process.wait(300) == 0, log.read_text()
    assert re.search(r"Resumed from .*checkpoint-[12]0", log.read_text())
    assert deviation(run_sd15.lora(), undisturbed) < 1e-3


def test_a_process_that_draws_is_not_taken_for_lost(run_sd15, tmp_path):
    options = {"max_train_steps": 2, "validation_prompt": "a picture", "num_validation_images": 40, "ddp_timeout": 10}
    words = [*command(run_sd15, **options), "--run_validation"]
    log = tmp_path / "log"
    main_process, other = start_two_processes(TRAINER, words, log)
    # It ends while the main process draws the last images.
    other.join(300)
    main_process.kill()
    assert other.exitcode == 0, log.read_text()
    times = re.findall(r"(\d\d:\d\d:\d\d),\d+ - INFO - __main__ - (?:\[RANK 0\] )?(Drawing|Saved)", log.read_text())
    start, end = (datetime.datetime.strptime(time, "%H:%M:%S") for time, _ in times[:2])
    assert (end - start).seconds > 10


class Signals(train_ncp_dpo_sd15.StopSignals):
    def __init__(self):
        self.stop, self.number, self.time, self.group = False, signal.SIGTERM, None, None


def test_a_signal_during_an_exchange_is_not_lost(monkeypatch):
    signals = Signals()
    signals.group = "a group of two, in which both are told to stop while they exchange"
    arriving = [signal.SIGTERM]

    def all_reduce(flags, operation, group):
        if arriving:
            signals.receive(arriving.pop())

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert not signals.agreed()
    assert signals.agreed() and signals.agreed()


def test_a_second_signal_ends_the_run_at_once(monkeypatch):
    signals, killed = Signals(), []
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append(number))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as a terminal and its launcher send them
        signals.receive(number)
    assert signals.stop and signals.number == signal.SIGINT and not killed
    monkeypatch.setattr(time, "monotonic", lambda: now + 3)
    signals.receive(signal.SIGUSR2)  # the launcher's death never counts
    assert not killed
    signals.receive(signal.SIGINT)
    assert killed == [signal.SIGINT]
