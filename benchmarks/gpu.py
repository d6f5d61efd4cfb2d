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

"""What needs a GPU, in parts: `make gpu` runs all of them, `make gpu-train` and so on one.

    python benchmarks/gpu.py train                    # both scripts with tiny models: precisions, flags, resume, two GPUs
    python benchmarks/gpu.py time                     # seconds, memory and MFU of full-size steps
    python benchmarks/gpu.py precision --model PATH   # the perceptual error on real weights, by timestep

Each part ends after at most 8 minutes (the last: 4), installs nothing, says why it skips what it skips, and writes what it
measured as it goes to `benchmarks/results/gpu_PART.json` and, as tables, to `benchmarks/results/gpu.md`.
`--device cpu` runs the same code where there is no GPU, small, to try it; it writes where `--results` says.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

MINUTES = {"train": 8, "time": 8, "precision": 4}
NUM_STEPS = 20
SCRIPTS = {"sd15": "train_ncp_dpo_sd15", "sdxl": "train_ncp_dpo_sdxl"}
# Rank 256 makes tensors of 4,096 elements, as few as bitsandbytes keeps 8-bit states for. β is for latents of 1,024 elements,
# and the error scale is given so that runs have it in common.
OPTIONS = {
    "rank": 256,
    "beta_dpo": 300,
    "ncp_error_scale": 3000,
    "learning_rate": 3e-4,
    "train_batch_size": 2,
    "max_train_steps": NUM_STEPS,
    "seed": 0,
    "report_to": "none",
}
# How far from the CPU's in fp32 the first step's errors may be, relative, and the loss of half the steps, which is about 0.7.
# What CUDA does in fp32 by default is TF32 in part, which has fp16's mantissa.
TOLERANCES = {"no": (0.03, 0.02), "fp16": (0.03, 0.02), "bf16": (0.1, 0.05)}
# Of weights after a resume or from two processes, to those of one run: the norm of the difference over the norm.
WEIGHT_TOLERANCE = 0.05


class Skip(Exception):
    """Says why something cannot run here."""


class Case(NamedTuple):
    kind: str
    precision: str
    flags: tuple = ()
    how: str = "train"

    def __str__(self):
        return " ".join([self.kind, self.precision, *self.flags, *[self.how] * (self.how != "train")])


FLAGS = ("--channels_last", "--use_8bit_adam", "--gradient_checkpointing")
HALF = ("fp16", "bf16")
# What takes longest comes last.
CASES = [
    *(Case(kind, precision) for kind in SCRIPTS for precision in ("no", *HALF)),
    *(Case(kind, precision, (flag,)) for kind in SCRIPTS for precision in HALF for flag in FLAGS),
    *(Case(kind, precision, FLAGS) for kind in SCRIPTS for precision in HALF),
    *(Case(kind, "fp16", how="scaler after a resume") for kind in SCRIPTS),
    *(Case(kind, precision, how="resume after a kill") for kind in SCRIPTS for precision in HALF),
    *(Case(kind, precision, how="two processes") for kind in SCRIPTS for precision in HALF),
    *(Case(kind, precision, ("--compile",)) for kind in SCRIPTS for precision in HALF),
    *(Case(kind, "bf16", ("--compile", *FLAGS)) for kind in SCRIPTS),
]


def check_requirements(case, device):
    """Raises `Skip` where this machine lacks what a case takes."""
    import torch

    if case.precision == "fp16" and device == "cpu":
        raise Skip("fp16 needs a GPU")
    if case.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skip("this GPU has no bf16")
    if "--use_8bit_adam" in case.flags and importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    if "--compile" in case.flags:
        if device == "cuda" and importlib.util.find_spec("triton") is None:
            raise Skip("triton is not installed")
        if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
            raise Skip("there is no C compiler")
    if case.how == "two processes" and device == "cuda" and torch.cuda.device_count() < 2:
        raise Skip("there is one GPU only")


@contextlib.contextmanager
def accelerate_on(device):
    """Lets accelerate choose `device`, anew in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    with mock.patch.dict(os.environ):
        set_device(os.environ, device)
        yield


def set_device(environment, device):
    environment.pop("ACCELERATE_USE_CPU", None)
    if device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"


class Bench:
    """Trains tiny models on `device`, in folders below `folder`, which is built when first needed."""

    def __init__(self, device, folder):
        self.device, self.folder, self.count = device, Path(folder), 0

    @functools.cached_property
    def data(self):
        import tiny_checkpoints

        return tiny_checkpoints.build_parquet(self.folder / "pairs", num_pairs=16)

    @functools.cache
    def checkpoint(self, kind):
        import tiny_checkpoints

        build = {"sd15": tiny_checkpoints.build_sd15, "sdxl": tiny_checkpoints.build_sdxl}[kind]
        return build(self.folder / kind)

    def create_output_dir(self):
        self.count += 1
        return self.folder / f"output-{self.count}"

    def words(self, case, output_dir, **options):
        import tiny_checkpoints

        options = {
            "pretrained_model_name_or_path": self.checkpoint(case.kind),
            "dataset_name": self.data,
            "resolution": tiny_checkpoints.RESOLUTION,
            "mixed_precision": case.precision,
            "output_dir": output_dir,
            **OPTIONS,
            **options,
        }
        return [*case.flags, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

    def train(self, case, output_dir, device=None, **options):
        """Trains in this process. Returns what was logged by step, and the seconds at which it was."""
        from accelerate import Accelerator

        logged, times = {}, []

        def record(accelerator, values, step=None, **kwargs):
            logged.setdefault(step, {}).update(values)
            times.append(time.perf_counter())

        script = importlib.import_module(SCRIPTS[case.kind])
        with accelerate_on(device or self.device), mock.patch.object(Accelerator, "log", record):
            script.main(script.parse_args(self.words(case, output_dir, **options)))
        return logged, times

    @functools.cache
    def expected(self, kind):
        """What the CPU logs in fp32."""
        return self.train(Case(kind, "no"), self.create_output_dir(), device="cpu")[0]

    def start(self, case, output_dir, **options):
        """Trains in a process of its own."""
        command = [sys.executable, str(ROOT / f"{SCRIPTS[case.kind]}.py"), *self.words(case, output_dir, **options)]
        return self.open(command, output_dir)

    def open(self, command, output_dir):
        environment = dict(os.environ)
        set_device(environment, self.device)
        log = output_dir.with_suffix(".log").open("w")
        options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


def load_lora(output_dir):
    import safetensors.torch

    return safetensors.torch.load_file(output_dir / "pytorch_lora_weights.safetensors")


def distance(lora, expected):
    """Of the up-weights, which began at 0: the norm of the difference over the norm."""
    import torch

    ups = [
        torch.cat([weights[n].flatten() for n in sorted(expected) if "lora.up" in n]) for weights in (lora, expected)
    ]
    return ((ups[0] - ups[1]).norm() / ups[1].norm()).item()


def median_deviation(logged, expected):
    """Of the losses."""
    return statistics.median(abs(values["loss"] - expected[step]["loss"]) for step, values in logged.items())


def check(condition, message):
    if not condition:
        raise AssertionError(message)


def run_training(bench, case):
    """A whole run beside the CPU's in fp32."""
    import torch

    output_dir, expected = bench.create_output_dir(), bench.expected(case.kind)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    logged, times = bench.train(case, output_dir)
    check(sorted(logged) == list(range(1, NUM_STEPS + 1)), f"logged the steps {sorted(logged)}")
    skipped = [step for step, values in logged.items() if not math.isfinite(values["grad_norm"])]
    first, first_expected = logged[1], expected[1]
    sides = ("error_w", "error_l")
    result = {
        "margin_at_step_0": first["margin"],
        "error_deviation": max(abs(first[side] / first_expected[side] - 1) for side in sides),
        "loss_deviation": median_deviation(logged, expected),
        "skipped_steps": len(skipped),
        "seconds_per_step": statistics.median(b - a for a, b in zip(times, times[1:])),
    }
    if bench.device == "cuda":
        result["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    error_tolerance, loss_tolerance = TOLERANCES[case.precision]
    check(first["margin"] == 0, f"the margin is {first['margin']} at step 0")
    check(len(skipped) <= 2, f"the steps {skipped} were skipped: their gradients are not finite")
    check(result["error_deviation"] <= error_tolerance, f"errors are {result['error_deviation']:.1%} off the CPU's")
    check(result["loss_deviation"] <= loss_tolerance, f"losses are {result['loss_deviation']:.3f} off the CPU's")
    check(all(weight.isfinite().all() for weight in load_lora(output_dir).values()), "the LoRA is not finite")
    if "--use_8bit_adam" in case.flags:
        path = output_dir / f"checkpoint-{NUM_STEPS}" / "optimizer.bin"
        states = torch.load(path, map_location="cpu", weights_only=False)["state"]
        check(torch.uint8 in dtypes_in(states), "no state of Adam has 8 bits")
    return result


def dtypes_in(values):
    """Of all tensors in nested dictionaries."""
    if isinstance(values, dict):
        return set().union(*map(dtypes_in, values.values()))
    return {getattr(values, "dtype", None)}


def run_resume_after_kill(bench, case):
    """A run that is killed after its first checkpoint and resumed, beside one that is not."""
    whole, killed = bench.create_output_dir(), bench.create_output_dir()
    expected, _ = bench.train(case, whole, checkpointing_steps=5)
    process = bench.start(case, killed, checkpointing_steps=5)
    while not any(killed.glob("checkpoint-*")):
        check(process.poll() is None, f"the run ended first: {killed.with_suffix('.log').read_text()}")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    check(not (killed / "pytorch_lora_weights.safetensors").exists(), "the run was not killed in time")
    logged, _ = bench.train(case, killed, checkpointing_steps=5, resume_from_checkpoint="latest")
    check(0 < len(logged) < NUM_STEPS and max(logged) == NUM_STEPS, f"the resumed run made the steps {sorted(logged)}")
    result = {
        "resumed_at": min(logged) - 1,
        "weight_deviation": distance(load_lora(killed), load_lora(whole)),
        "loss_deviation": median_deviation(logged, expected),
    }
    check(result["weight_deviation"] <= WEIGHT_TOLERANCE, f"weights are {result['weight_deviation']:.1%} off")
    if case.precision == "fp16":
        states = [load_scaler(folder / f"checkpoint-{NUM_STEPS}") for folder in (killed, whole)]
        check(states[0] == states[1], f"the scaler is {states[0]} after a resume, but {states[1]} without")
    return result


def load_scaler(checkpoint):
    import torch

    return torch.load(checkpoint / "scaler.pt", weights_only=False)


def run_scaler_after_resume(bench, case):
    """A checkpoint whose loss scale is none that a new scaler would have."""
    import torch

    output_dir, scale = bench.create_output_dir(), 512.0
    bench.train(case, output_dir, checkpointing_steps=2, max_train_steps=4)
    shutil.rmtree(output_dir / "checkpoint-4")
    before = {**load_scaler(output_dir / "checkpoint-2"), "scale": scale}
    torch.save(before, output_dir / "checkpoint-2" / "scaler.pt")
    bench.train(case, output_dir, checkpointing_steps=2, max_train_steps=4, resume_from_checkpoint="latest")
    after = load_scaler(output_dir / "checkpoint-4")
    check(after["scale"] == scale, f"the scale is {after['scale']} after a resume with {scale}")
    steps = after["_growth_tracker"] - before["_growth_tracker"]
    check(steps == 2, f"the scaler counted {steps} steps after the resume, but there were 2")
    return {"scale": after["scale"]}


def run_two_processes(bench, case):
    """Two processes beside one with as many pairs per step."""
    one, two = bench.create_output_dir(), bench.create_output_dir()
    bench.train(case, one, train_batch_size=2 * OPTIONS["train_batch_size"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = bench.open([*launcher, str(ROOT / f"{SCRIPTS[case.kind]}.py"), *bench.words(case, two)], two)
    try:
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    check(process.returncode == 0, two.with_suffix(".log").read_text())
    result = {"weight_deviation": distance(load_lora(two), load_lora(one))}
    check(result["weight_deviation"] <= WEIGHT_TOLERANCE, f"weights are {result['weight_deviation']:.1%} off")
    return result


RUNNERS = {
    "train": run_training,
    "resume after a kill": run_resume_after_kill,
    "scaler after a resume": run_scaler_after_resume,
    "two processes": run_two_processes,
}


def run_case(bench, case):
    """
    Runs a case, which returns what it measured.

    Raises:
        `Skip`: this machine lacks what it takes; `AssertionError`: something is not as it should be.
    """
    check_requirements(case, bench.device)
    try:
        return RUNNERS[case.how](bench, case)
    finally:
        if "--compile" in case.flags:
            import torch

            torch._dynamo.reset()


# The parts


def describe(device):
    import torch

    packages = ("torch", "diffusers", "accelerate", "peft", "bitsandbytes")
    installed = [package for package in packages if importlib.util.find_spec(package)]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "versions": {package: importlib.metadata.version(package) for package in installed}}


def main_train(args, path):
    def stop(number, frame):
        raise TimeoutError(f"{MINUTES['train']} minutes are over")

    signal.signal(signal.SIGALRM, stop)
    start, results = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, folder)
        for case in CASES:
            begin = time.perf_counter()
            left = 60 * MINUTES["train"] - (begin - start)
            try:
                if left < 1:
                    raise Skip(f"{MINUTES['train']} minutes are over")
                signal.alarm(math.floor(left))
                result = {"outcome": "passed", **run_case(bench, case)}
            except Skip as reason:
                result = {"outcome": "skipped", "reason": str(reason)}
            except Exception as error:
                result = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
            finally:
                signal.alarm(0)
            results[str(case)] = {**result, "seconds": time.perf_counter() - begin}
            print(f"{case}: {' '.join(f'{name} {value}' for name, value in results[str(case)].items())}", flush=True)
            write(path, {**describe(args.device), "cases": results})
    if failed := [name for name, result in results.items() if result["outcome"] == "failed"]:
        sys.exit(f"failed: {'; '.join(failed)}")


def main_time(args, path):
    run_part("time", ["step_cost.py", "time", *["--model", "small"] * (args.device == "cpu"), "--json", path])


def main_precision(args, path):
    if args.model is None:
        raise Skip("no model is given: make gpu MODEL=PATH")
    run_part("precision", ["precision.py", "--model", args.model, "--json", path])


def run_part(name, words):
    """Runs a benchmark of its own, which writes its results as it goes, as long as the part may take."""
    command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *map(str, words[1:])]
    try:
        result = subprocess.run(command, timeout=60 * MINUTES[name])
    except subprocess.TimeoutExpired:
        print(f"{name}: {MINUTES[name]} minutes are over; what was measured by then is kept")
    else:
        sys.exit(result.returncode)


def write(path, report):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


# The table


def train_table(report):
    rows = []
    for name, result in report["cases"].items():

        def show(key, form):
            return f"{result[key]:{form}}" if key in result else ""

        outcome = result["outcome"] + (f": {result['reason'].splitlines()[0]:.120}" if "reason" in result else "")
        numbers = [show("margin_at_step_0", "g"), show("error_deviation", ".2%"), show("loss_deviation", ".4f")]
        numbers += [show("weight_deviation", ".2%"), show("seconds_per_step", ".3f"), show("peak_memory_mb", ".0f")]
        rows.append([name, outcome, *numbers])
    header = ["case", "outcome", "margin at step 0", "errors", "loss", "weights", "s per step", "peak MB"]
    return markdown(header, rows)


def time_table(report):
    def show(result, key, form):
        return f"{result[key]:{form}}" if result and result.get(key) is not None else "not measured"

    keys = {"pairs_per_second": ".2f", "peak_memory_gb": ".1f", "mfu": ".1%"}
    rows = [
        [model, name, *(show(result, key, form) for key, form in keys.items())]
        for model, part in report["models"].items()
        for name, result in part["results"].items()
    ]
    return markdown(["model", "step", "pairs per second", "peak memory, GB", "MFU"], rows)


def precision_table(report):
    keys = {"min_cosine": ".4f", "mean_error": ".2%", "correlation": ".4f", "right_sign": ".1%"}
    rows = [
        [span, name, *(f"{values[key]:{form}}" for key, form in keys.items())]
        for span, results in report["bins"].items()
        for name, values in results.items()
    ]
    return markdown(["timesteps", "", "smallest cosine", "error of `e`", "correlation of margins", "right sign"], rows)


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


TEXT = """# On a GPU

Written by `make gpu`.

## Both scripts with tiny models

20 steps of each; "errors" are how far the first step's are from those of the CPU in fp32, "loss" the median of that over all steps
(after a resume: from the run that was not interrupted), "weights" those after a resume or from two processes.

{train}

## What a step costs

Full-size models with random weights; "the authors' way" and "diffusers' way" are described in `benchmarks/step_cost.py`.

{time}

## Precision on real weights

{precision}
"""


def write_tables(folder):
    parts = {}
    for name, table in [("train", train_table), ("time", time_table), ("precision", precision_table)]:
        path, parts[name] = folder / f"gpu_{name}.json", "Not measured."
        if path.is_file():
            report = json.loads(path.read_text())
            versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
            parts[name] = f"{report['device']}; {versions}.\n\n{table(report)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.md").write_text(TEXT.format(**parts))


def main(args):
    try:
        if importlib.util.find_spec("torch") is None:
            raise Skip("torch is not installed")
        import torch

        if args.device == "cuda" and not torch.cuda.is_available():
            raise Skip("there is no GPU")
        try:
            for module in (*SCRIPTS.values(), "tiny_checkpoints"):
                importlib.import_module(module)
        except ImportError as error:
            raise Skip(error) from error
        part = {"train": main_train, "time": main_time, "precision": main_precision}[args.part]
        part(args, args.results / f"gpu_{args.part}.json")
    except Skip as reason:
        print(f"{args.part}: skipped, {reason}")
    finally:
        write_tables(args.results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=MINUTES)
    parser.add_argument("--model", help="hub id or folder of a Stable Diffusion, for precision")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write to")
    main(parser.parse_args())
