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

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import train_ncp_dpo_sd15
from conftest import ROOT, start_script


TRAINER = "train_ncp_dpo_sd15.py"
LAUNCHERS = {
    "accelerate": (1, ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]),
    "torchrun": (2, ["torch.distributed.run", "--nproc_per_node", "2"]),
}


def command(run, **options):
    options = {"loss_space": "latent", "max_train_steps": 4000, "checkpointing_steps": 4000, **options}
    return run.command([], {f"--{name}": value for name, value in options.items()})


def launch(launcher, words, log):
    """A launcher in a session of its own, and its number of trainers."""
    number, module = LAUNCHERS[launcher]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PET_MASTER_PORT": port}
    words = [sys.executable, "-m", *module, str(ROOT / TRAINER), *words]
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True, "env": environment}
        return number, subprocess.Popen(words, **options)


def wait_for_steps(log, number=3):
    deadline = time.monotonic() + 120
    while not any(int(step) >= number for step in re.findall(r" (\d+)/4000", log.read_text())):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def stopped_step(run):
    (checkpoint,) = run.output_dir.glob("*checkpoint-*")
    return json.loads((checkpoint / "training_state.json").read_text())["global_step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_the_trainer(run_sd15, tmp_path, number):
    log = tmp_path / "log"
    process = start_script(TRAINER, command(run_sd15), log)
    wait_for_steps(log)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number, log.read_text()
    assert stopped_step(run_sd15) >= 3
    assert "Stopping after this batch" in log.read_text()
    assert f"Stopped by {number.name}" in log.read_text()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_the_launcher(run_sd15, tmp_path, launcher, number):
    log = tmp_path / "log"
    num_trainers, process = launch(launcher, command(run_sd15), log)
    wait_for_steps(log)
    children = psutil.Process(process.pid).children()
    trainers = [child for child in children if TRAINER in " ".join(child.cmdline())]
    assert len(trainers) == num_trainers
    process.send_signal(number)
    process.wait(30)
    _, alive = psutil.wait_procs(trainers, timeout=30)
    assert not alive, log.read_text()
    assert stopped_step(run_sd15) >= 3
    assert "Stopping after this batch" in log.read_text()


def test_it_stops_within_an_accumulated_step(run_sd15, tmp_path):
    log = tmp_path / "log"
    options = {"gradient_accumulation_steps": 50, "max_train_steps": 4000}
    process = start_script(TRAINER, command(run_sd15, **options), log)
    wait_for_steps(log, 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143, log.read_text()
    state = run_sd15.state(f"checkpoint-{stopped_step(run_sd15)}")
    # Numbers of whole steps alone: the gradients of the unfinished one are dropped.
    assert state["next_pair"] == state["global_step"] * 100


class Signals(train_ncp_dpo_sd15.StopSignals):
    def __init__(self):
        self.stop, self.number, self.time, self.group = False, signal.SIGTERM, None, None


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
