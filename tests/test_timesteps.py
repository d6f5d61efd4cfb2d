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

"""Which timesteps are trained on and with which weights, the unit of errors, and pairs that are held out."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import train_ncp_dpo_sd15
from datasets import load_dataset
from tiny_checkpoints import copy_checkpoint, pair_columns, write_parquet

from diffusers import EulerAncestralDiscreteScheduler


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    """Between two LoRAs' up weights, over what was learnt."""
    a, b = (torch.cat([weight.flatten() for name, weight in lora.items() if "lora.up" in name]) for lora in (a, b))
    return ((a - b).norm() / b.norm()).item()


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def seen(monkeypatch):
    """Timesteps of all batches that were trained on or measured, in order."""
    timesteps, noise_batch = [], train_ncp_dpo_sd15.noise_batch

    def record(args, batch, *arguments):
        timesteps.append(batch["timesteps"].tolist())
        return noise_batch(args, batch, *arguments)

    monkeypatch.setattr(train_ncp_dpo_sd15, "noise_batch", record)
    return timesteps


def test_both_ends_of_the_range_are_trained_on_and_nothing_else(run_sd15, seen):
    run_sd15(loss_space="latent", min_timestep=500, max_timestep=501, max_train_steps=6)
    assert {timestep for batch in seen for timestep in batch} == {500, 501}


def test_a_range_of_all_timesteps_changes_nothing(run_sd15):
    run_sd15(loss_space="latent")
    plain = run_sd15.lora()
    run_sd15.into("range")(loss_space="latent", min_timestep=0, max_timestep=999)
    assert equal(run_sd15.lora(), plain)


def test_those_of_a_few_step_model_are_all_that_is_trained_on(run_sd15, checkpoints, tmp_path, seen):
    # As the turbo models have it.
    turbo = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    turbo.save_config(copy_checkpoint(checkpoints["sd15"], tmp_path / "turbo") / "scheduler")
    turbo.set_timesteps(4)
    timesteps = sorted(turbo.timesteps.long().tolist())
    assert timesteps == [249, 499, 749, 999]
    options = {"pretrained_model_name_or_path": tmp_path / "turbo", "train_batch_size": 12, "max_train_steps": 6}
    options |= {"ncp_error_scale": "auto"}
    run_sd15("--timesteps", *map(str, reversed(timesteps)), **options)
    assert {timestep for batch in seen for timestep in batch} == set(timesteps)
    assert run_sd15.lora()


@pytest.mark.bad_input
def test_few_timesteps_that_there_are_not(run_sd15, no_models):
    with pytest.raises(ValueError, match="--timesteps or .* within 0 and 999"):
        run_sd15("--timesteps", "249", "1000")
    with pytest.raises(ValueError, match="either --timesteps or --min_timestep and --max_timestep"):
        run_sd15("--timesteps", "249", "499", max_timestep=600)


@pytest.mark.bad_input
@pytest.mark.parametrize("first, last", [(600, 500), (0, 1000), (1000, None)])
def test_timesteps_that_there_are_not(run_sd15, no_models, first, last):
    message = f"--min_timestep {first} to --max_timestep {last or 999} must be within 0 and 999"
    with pytest.raises(ValueError, match=message):
        run_sd15(min_timestep=first, max_timestep=last)


def test_the_scale_is_measured_evenly_within_the_range_on_pairs_that_come_again(run_sd15, seen, caplog, monkeypatch):
    for name, number in (("SCALE_BLOCK_SIZE", 64), ("MAX_SCALE_PAIRS", 512)):
        monkeypatch.setattr(train_ncp_dpo_sd15, name, number)
    caplog.set_level("INFO")
    options = {"min_timestep": 200, "max_timestep": 299, "max_train_steps": 1, "train_batch_size": 12}
    run_sd15(ncp_error_scale="auto", **options)
    # 12 pairs; what was trained on is the last batch.
    timesteps = np.concatenate(seen[:-1])
    assert len(timesteps) >= 64 and timesteps.min() >= 200 and timesteps.max() <= 299
    counts = np.bincount((timesteps - 200) // 10, minlength=10)
    assert np.abs(counts - len(timesteps) / 10).max() <= 2
    # The last line with the flag is all that a run like this one needs.
    scale = re.findall(r"--ncp_error_scale ([\d.e+]+)", caplog.text)[-1]
    percent = re.findall(r"the error scale to (\d+) %", caplog.text)[-1]
    assert len(timesteps) == 512 or int(percent) <= 10
    trained = run_sd15.lora()
    assert run_sd15.state("checkpoint-1")["error_scale"] == float(scale)
    run_sd15.into("given")(ncp_error_scale=scale, **options)
    assert equal(run_sd15.lora(), trained)


def test_measuring_leaves_the_lora_alone_and_depends_on_the_seed(run_sd15):
    options = {"ncp_error_scale": "auto", "learning_rate": 0, "max_train_steps": 1, "train_batch_size": 12}
    run_sd15(**options)
    assert not any(weight.any() for weight in run_sd15.up_weights().values())
    scale = run_sd15.state("checkpoint-1")["error_scale"]
    run_sd15.into("again")(**options)
    assert run_sd15.state("checkpoint-1")["error_scale"] == scale
    run_sd15.into("other")(**options, seed=1)
    assert run_sd15.state("checkpoint-1")["error_scale"] != scale


def test_metrics_by_timestep_range_add_up(run_sd15):
    run_sd15(loss_space="latent", num_eval_pairs=6, max_train_steps=2, validation_steps=1)
    rows = read_csv(run_sd15.output_dir / "eval.csv")
    for step in "012":
        of_step = {row["timesteps"]: row for row in rows if (row["step"], row["space"]) == (step, "latent")}
        total = of_step.pop("all")
        weights = [int(row["pairs"]) for row in of_step.values()]
        assert len(weights) > 2 and sum(weights) == int(total["pairs"])
        for metric in ("implicit_accuracy", "margin", "drift_w", "drift_l"):
            mean = np.average([float(row[metric]) for row in of_step.values()], weights=weights)
            assert mean == pytest.approx(float(total[metric]), abs=1e-6)


# --- held-out pairs ---------------------------------------------------------------------------------------------------


def columns_of_prompts():
    """12 pairs of 6 prompts."""
    return {**pair_columns(12, 0), "caption": [f"prompt {index // 2}" for index in range(12)]}


@pytest.fixture
def pairs_of_prompts(tmp_path):
    return write_parquet(tmp_path / "prompts", columns_of_prompts())


def rows_of(run, monkeypatch, **options):
    """Rows that were trained on and rows that were measured."""
    rows = {"trained": set(), "held out": set()}
    tabulate = train_ncp_dpo_sd15.tabulate

    def record(batch, errors):
        rows["trained" if errors.policy.requires_grad else "held out"].update(batch["rows"].tolist())
        return tabulate(batch, errors)

    monkeypatch.setattr(train_ncp_dpo_sd15, "tabulate", record)
    run(**options)
    return rows["trained"], rows["held out"]


def test_no_prompt_of_a_held_out_pair_is_trained_on(run_sd15, pairs_of_prompts, monkeypatch):
    options = {"dataset_name": pairs_of_prompts, "loss_space": "latent", "max_train_steps": 8, "num_eval_pairs": 3}
    trained, held_out = rows_of(run_sd15, monkeypatch, **options)
    assert len(held_out) == 4 and len(trained) == 8 and not trained & held_out
    assert {row // 2 for row in trained}.isdisjoint(row // 2 for row in held_out)
    # The same for a seed, others for another.
    assert rows_of(run_sd15.into("again"), monkeypatch, **options) == (trained, held_out)
    assert rows_of(run_sd15.into("other"), monkeypatch, **options, seed=2)[1] != held_out


@pytest.mark.parametrize("loss_space, loss_type", [("ncp", "dpo"), ("latent", "cpo"), ("ncp", "sft")])
def test_held_out_pairs_are_measured(run_sd15, caplog, loss_space, loss_type):
    caplog.set_level("INFO")
    options = {"loss_space": loss_space, "loss_type": loss_type, "num_eval_pairs": 5, "validation_steps": 2}
    run_sd15(max_train_steps=5, checkpointing_steps=2, **options)
    rows = read_csv(run_sd15.output_dir / "eval.csv")
    assert list(rows[0])[:4] == ["step", "space", "timesteps", "pairs"]
    assert {int(row["step"]) for row in rows} == {0, 2, 4, 5}
    assert {row["space"] for row in rows} == {"latent", loss_space}
    for row in rows:
        if row["step"] == "0":
            assert float(row["drift_w"]) == float(row["drift_l"]) == 0
    of_all = [row for row in rows if row["timesteps"] == "all" and row["space"] == loss_space]
    assert [row["pairs"] for row in of_all] == ["5"] * 4
    assert len({row["loss"] for row in of_all}) == 4
    logged = run_sd15.scalars(f"eval/{loss_space}/implicit_accuracy/all")
    assert logged == pytest.approx([float(row["implicit_accuracy"]) for row in of_all])
    for step in "0245":
        parts = [row for row in rows if row["step"] == step and row["space"] == loss_space]
        whole, *buckets = parts
        assert sum(int(row["pairs"]) for row in buckets) == 5
        mean = sum(int(row["pairs"]) * float(row["error_w"]) for row in buckets) / 5
        assert mean == pytest.approx(float(whole["error_w"]), rel=1e-5)
    card = (run_sd15.output_dir / "README.md").read_text()
    metrics = list(rows[0])[4:]
    assert all(
        f"| {row['step']} | {' | '.join(f'{float(row[name]):.3g}' for name in metrics)} |" in card for row in of_all
    )
    best, last = min(of_all, key=lambda row: float(row["loss"])), of_all[-1]
    kept = "no" if best["step"] == "0" else "a"
    assert f"lowest loss at step {best['step']}, {kept} checkpoint" in caplog.text
    share = float(last["drift_w"]) / (float(last["error_w"]) - float(last["drift_w"]))
    assert f"by {share:.1%} of the reference's" in caplog.text
    assert f"--lora_weights {run_sd15.output_dir}" in caplog.text


def test_measuring_held_out_pairs_changes_no_training_and_resumes_exactly(run_sd15):
    options = {"num_eval_pairs": 3, "max_train_steps": 6, "loss_space": "latent"}
    run_sd15(validation_steps=1, checkpointing_steps=3, **options)
    trained, measured = run_sd15.lora(), (run_sd15.output_dir / "eval.csv").read_text()
    shutil.rmtree(run_sd15.output_dir / "checkpoint-6")
    run_sd15(validation_steps=1, resume_from_checkpoint="latest", **options)
    assert equal(run_sd15.lora(), trained)
    # Steps after the checkpoint are there once.
    assert (run_sd15.output_dir / "eval.csv").read_text() == measured
    middle, last = (run_sd15.output_dir / f"checkpoint-{step}" for step in (3, 6))
    run_sd15.into("seldom")(validation_steps=100, **options)
    assert equal(run_sd15.lora(), trained)
    # A run that was stopped after its last checkpoint, but before it measured, does so when it is resumed.
    run_sd15.into("stopped")(resume_from_checkpoint=last, **options)
    (head, *rows) = (run_sd15.output_dir / "eval.csv").read_text().splitlines()
    assert rows and [head, *rows] == [head, *(row for row in measured.splitlines() if row.startswith("6,"))]
    assert equal(run_sd15.lora(), trained)
    # But not where it would not have been measured.
    run_sd15.into("between")(resume_from_checkpoint=middle, validation_steps=4, **options)
    assert {row["step"] for row in read_csv(run_sd15.output_dir / "eval.csv")} == {"4", "6"}


@pytest.mark.bad_input
def test_held_out_pairs_that_are_skipped_are_named(run_sd15, monkeypatch, caplog, tmp_path, pairs_of_prompts):
    options = {"loss_space": "latent", "max_train_steps": 2, "num_eval_pairs": 3, "validation_steps": 1}
    _, held_out = rows_of(run_sd15, monkeypatch, dataset_name=pairs_of_prompts, **options)
    columns, bad = columns_of_prompts(), min(held_out)
    columns["jpg_0"][bad] = b"no image"
    dataset = write_parquet(tmp_path / "bad", columns)
    run_sd15.into("skipped")(dataset_name=dataset, on_bad_sample="skip", **options)
    assert len(re.findall(rf"Row {bad} \('prompt {bad // 2}'\): jpg_0 cannot be read", caplog.text)) == 3


@pytest.mark.bad_input
def test_held_out_pairs_must_leave_some(run_sd15, no_models, pairs_of_prompts):
    message = "--num_eval_pairs 11 leaves no pair to train on"
    with pytest.raises(ValueError, match=message):
        run_sd15(dataset_name=pairs_of_prompts, num_eval_pairs=11)


# --- soft labels ------------------------------------------------------------------------------------


def soft_labels(folder, probabilities, **labels):
    columns = pair_columns(len(probabilities), 0) | labels
    return write_parquet(folder, {**columns, "sure": probabilities})


@pytest.mark.parametrize("loss_type", ["dpo", "sft", "mapo"])
def test_certain_preferences_are_labels(run_sd15, tmp_path, loss_type):
    options = {"loss_type": loss_type, "loss_space": "latent", "max_train_steps": 3}
    labels = {"label_0": [1, 0] * 6}
    certain = soft_labels(tmp_path / "certain", [1.0, 0.0] * 6, **labels)
    run_sd15(dataset_name=certain, **options)
    plain = run_sd15.lora()
    run_sd15.into("certain")(dataset_name=certain, preference_probability_column="sure", **options)
    assert distance(run_sd15.lora(), plain) < 1e-3
    doubtful = soft_labels(tmp_path / "doubtful", [0.6, 0.3] * 6, **labels)
    run_sd15.into("doubtful")(dataset_name=doubtful, preference_probability_column="sure", **options)
    assert not equal(run_sd15.lora(), plain)


@pytest.mark.bad_input
@pytest.mark.parametrize("value, message", [(1.5, "Row 1: the preference probability is 1.5"), (None, "is None")])
def test_what_is_no_probability(run_sd15, no_models, tmp_path, value, message):
    data = soft_labels(tmp_path / "data", [0.5, value, 0.5])
    with pytest.raises(ValueError, match=message):
        run_sd15(dataset_name=data, preference_probability_column="sure")


@pytest.mark.bad_input
def test_a_probability_column_that_is_not_there(run_sd15, no_models):
    with pytest.raises(ValueError, match=r"no column 'sure' \(--preference_probability_column\)"):
        run_sd15(preference_probability_column="sure")


@pytest.mark.bad_input
def test_sft_has_no_weight(run_sd15, no_models):
    with pytest.raises(ValueError, match="does not go with --loss_type sft"):
        run_sd15(loss_type="sft", sft_weight=1)


def test_beta_by_default_is_that_of_the_loss(run):
    script = {"sd15": "sd15", "sdxl": "sdxl"}[run.kind]
    module = __import__(f"train_ncp_dpo_{script}")
    words = ["--pretrained_model_name_or_path", "x", "--dataset_name", "x", "--loss_type"]
    betas = {name: module.parse_args([*words, name]).beta_dpo for name in ("dpo", "simpo", "mapo", "linear")}
    assert betas == {"dpo": 5000, "simpo": 5000, "mapo": 0.1, "linear": 500 if run.kind == "sdxl" else 100}


# --- no waiting for the device ----------------------------------------------------------------------------------------


class CountTransfers(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes the processor wait for a device: values that become Python's."""

    def __init__(self):
        super().__init__()
        self.active, self.found = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.active and function is torch.ops.aten._local_scalar_dense.default:
            self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_space", ["ncp", "latent"])
def test_no_value_is_asked_for_between_a_batch_and_the_optimizers_step(run_sd15, monkeypatch, loss_space):
    counter, steps = CountTransfers(), []
    noise_batch, step = train_ncp_dpo_sd15.noise_batch, torch.optim.AdamW.step

    def starts(*arguments):
        counter.active = True
        return noise_batch(*arguments)

    def ends(self, *arguments, **options):
        counter.active = False
        steps.append(None)
        return step(self, *arguments, **options)

    monkeypatch.setattr(train_ncp_dpo_sd15, "check_prediction", lambda *args, **models: None)  # before the first step
    monkeypatch.setattr(train_ncp_dpo_sd15, "noise_batch", starts)
    monkeypatch.setattr(torch.optim.AdamW, "step", ends)
    with counter:
        run_sd15(loss_space=loss_space, max_train_steps=3)
    assert len(steps) == 3
    assert not counter.found


def test_what_is_encoded_keeps_the_probability(run_sd15, tmp_path):
    import encode_preferences

    data = soft_labels(tmp_path / "soft", [0.9, 0.2, 0.6, 0.7], label_0=[1, 0, 1, 1])
    # Where a gradient is all rounding, which differs between processors, Adam would make a whole step of it.
    options = {
        "preference_probability_column": "sure",
        "loss_space": "latent",
        "max_train_steps": 2,
        "adam_epsilon": 1,
    }
    run_sd15(dataset_name=data, **options)
    trained = run_sd15.lora()
    words = ["--pretrained_model_name_or_path", run_sd15.arguments["--pretrained_model_name_or_path"]]
    words += ["--dataset_name", data, "--resolution", 32, "--preference_probability_column", "sure"]
    encode_preferences.main(
        encode_preferences.parse_args([str(w) for w in [*words, "--output_dir", tmp_path / "encoded"]])
    )
    stored = load_dataset("arrow", data_files=str(tmp_path / "encoded/pairs/*.arrow"), split="train")
    assert stored["winner_probability"][:] == pytest.approx([0.9, 0.8, 0.6, 0.7])
    run_sd15.into("from_encoded")(dataset_name=None, encoded_data_dir=tmp_path / "encoded", **options)
    assert distance(run_sd15.lora(), trained) < 1e-3
    # Other probabilities of the same labels are other data, for encoding and for a resume.
    words[3] = soft_labels(tmp_path / "corrected", [0.9, 0.2, 0.55, 0.7], label_0=[1, 0, 1, 1])
    with pytest.raises(ValueError, match="probabilities is .* was encoded with"):
        encode_preferences.main(
            encode_preferences.parse_args([str(w) for w in [*words, "--output_dir", tmp_path / "encoded"]])
        )
    resume = {**options, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    run_sd15.into("from_encoded")(dataset_name=None, encoded_data_dir=tmp_path / "encoded", **resume)
    state = run_sd15.output_dir / "checkpoint-2/training_state.json"
    state.write_text(re.sub('"probabilities": ".', '"probabilities": "-', state.read_text()))
    shutil.rmtree(run_sd15.output_dir / "checkpoint-3")
    with pytest.raises(ValueError, match="the data are 4 pairs, but were 4 others"):
        run_sd15(dataset_name=None, encoded_data_dir=tmp_path / "encoded", **resume)
    with pytest.raises(ValueError, match="--preference_probability_column is None, .* encoded with 'sure'"):
        run_sd15.into("refused")(dataset_name=None, encoded_data_dir=tmp_path / "encoded", loss_space="latent")
    assert json.loads((tmp_path / "encoded/encoding.json").read_text())["preference_probability_column"] == "sure"
