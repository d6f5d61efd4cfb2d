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

import io
from concurrent.futures import Executor, Future

import experiment
import fresh
import numpy as np
import pandas as pd
import protocol
import pytest
import studies
from datasets import Dataset
from PIL import Image
from scenes import SCENES, Reward


NUM_CAPTIONS, POOL_SIZE = 30, 8


class Inline(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A folder with a pool of random rewards. Its pictures are their numbers."""
    monkeypatch.setattr(studies, "POOL_SIZE", POOL_SIZE)
    monkeypatch.setattr(fresh, "split_scenes", lambda: (SCENES[:NUM_CAPTIONS], [], []))
    rng, number = np.random.default_rng(0), NUM_CAPTIONS * POOL_SIZE
    parts = {name: rng.random(number) for name in Reward._fields}
    pictures = [str(index).encode() for index in range(number)]
    Dataset.from_dict({"picture": pictures, **parts}).to_parquet(str(tmp_path / fresh.POOL_NAME))
    return tmp_path


def pictures_of(rows):
    return {int(row[name]) for row in rows for name in ("jpg_0", "jpg_1")}


def test_every_seed_draws_its_own_pictures_and_labels(pool):
    rows, rewards = fresh.draw_pairs(pool, "first", 10)
    assert fresh.draw_pairs(pool, "first", 10)[0] == rows
    assert len(rows) == NUM_CAPTIONS * 15
    # Only captions to train on, each with six pictures of its own part of the pool
    for row in rows:
        assert {int(row[name]) // POOL_SIZE for name in ("jpg_0", "jpg_1")} == {
            [scene.caption for scene in SCENES].index(row["caption"])
        }
    assert len(pictures_of(rows)) == NUM_CAPTIONS * experiment.PICTURES_PER_SCENE
    _, parts = fresh.load_pool(pool)
    assert all(parts.total[int(row["jpg_0"])] == pytest.approx(rewards[int(row["image_0_uid"])]) for row in rows)

    others, _ = fresh.draw_pairs(pool, "first", 11)
    assert pictures_of(others) != pictures_of(rows)
    labels = {(row["jpg_0"], row["jpg_1"]): row["label_0"] for row in rows}
    shared = [row["label_0"] == labels[pair] for row in others if (pair := (row["jpg_0"], row["jpg_1"])) in labels]
    assert len(shared) > 50 and 0.6 < np.mean(shared) < 1

    # Another judge labels the same pairs.
    judged, _ = fresh.draw_pairs(pool, "second", 10)
    assert [(row["jpg_0"], row["jpg_1"]) for row in judged] == [(row["jpg_0"], row["jpg_1"]) for row in rows]
    assert [row["label_0"] for row in judged] != [row["label_0"] for row in rows]


def test_selections_have_the_same_size(pool):
    rows, rewards = fresh.draw_pairs(pool, "first", 10)
    selected = {
        name: fresh.select_rows(rows, rewards, "first", name, 10) for name in ("all", "filtered", "agreed", "matched")
    }
    assert selected["all"] == rows
    number = len(selected["filtered"])
    assert number < len(rows) / 2 and len(selected["agreed"]) == len(selected["matched"]) == number
    # The winner of every filtered pair wins all its pairs.
    losers = {row["image_1_uid"] if row["label_0"] else row["image_0_uid"] for row in rows}
    assert all(
        (row["image_0_uid"] if row["label_0"] else row["image_1_uid"]) not in losers for row in selected["filtered"]
    )

    def ahead(name):
        gaps = fresh.gaps_of(selected[name], rewards)
        return np.where([row["label_0"] == 1 for row in selected[name]], gaps, -gaps)

    # Agreed labels are the cleanest, and matched pairs have the filtered pairs' gaps but none of these pairs.
    assert np.mean(ahead("agreed") > 0) > np.mean(ahead("filtered") > 0) > np.mean(ahead("all") > 0)
    assert np.mean(ahead("matched")) == pytest.approx(np.mean(ahead("filtered")), abs=0.02)
    assert np.mean(ahead("all")) < np.mean(ahead("filtered")) - 0.05
    ids = {name: {row["ranking_id"] for row in kept} for name, kept in selected.items()}
    assert not ids["matched"] & ids["filtered"]
    again = fresh.select_rows(rows, rewards, "first", "agreed", 10)
    assert again == selected["agreed"] != fresh.select_rows(rows, rewards, "first", "agreed", 11)


def test_checkpoints_around_the_chosen_step():
    assert fresh.checkpoints_around(150) == (125, 150, 175)
    assert fresh.checkpoints_around(25) == fresh.checkpoints_around(50) == (25, 50, 75)


def test_shares_of_what_a_judge_can_gain(monkeypatch):
    monkeypatch.setattr(studies, "POOL_SIZE", 2)
    # Two captions. The better picture has more match in the first, and more quality and less style in the second.
    parts = Reward(*fresh.torch.tensor([[0.0, 0, 0, 1], [0, 0.8, 0, 0], [0, 0, 0.4, 0]]))
    lines = fresh.describe_shares(parts, studies.Judge((0.5, 0.25, 0.25), 1e-6))
    assert lines == [
        "quality: weight 0.500, gain +0.250, share 83%",
        "match: weight 0.250, gain +0.200, share 33%",
        "style: weight 0.250, gain -0.100, share -17%",
        "reward: gain +0.150; 100% of labels are right",
    ]


def test_a_study_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    for module, name, value in [
        (protocol, "SCENES", SCENES[::24]),
        (protocol, "NUM_TRAINING_SCENES", 8),
        (experiment, "PICTURES_PER_SCENE", 3),
        (experiment, "NUM_INFERENCE_STEPS", 1),
        (experiment, "MEASURED_INFERENCE_STEPS", 1),
        (experiment, "create_workers", lambda number: Inline()),
        (experiment, "choose_settings", lambda folder, file, method: (1e-3, 200, (1, 2, 3), 2)),
        (studies, "POOL_SIZE", 4),
        (studies, "PICTURES_PER_CAPTION", 2),
        (studies, "STEPS_AROUND", 1),
    ]:
        monkeypatch.setattr(module, name, value)
    rows = {"judged": studies.Row("simpo-latent-filtered", "second", "filtered", {"train_batch_size": 2})}
    monkeypatch.setitem(studies.STUDIES, "tiny", studies.Study(rows, range(10, 11), []))
    folder, output_dir = tmp_path / "world", tmp_path / "results"
    args = fresh.parse_args(["tiny", "--folder", str(folder), "--output_dir", str(output_dir)])
    fresh.main(args)
    file = output_dir / studies.RUNS_NAME
    runs = protocol.load_runs(file)
    assert list(runs) == ["base-second-10", "tiny-judged-10"]
    judged = runs["tiny-judged-10"]
    assert judged["test"].keys() == {"1", "2", "3"} and len(judged["test"]["2"]["total"]) == 2
    for word in ("--train_batch_size 2", "encoded-second-filtered-10", "--loss_type simpo"):
        assert f"{word} " in judged["command"]
    measured, judge = judged["test"]["3"], studies.JUDGES["second"]
    total = judge.total([measured[name] for name in Reward._fields])
    assert np.mean(measured["total"]) == pytest.approx(total, abs=2e-4)
    pictures = [Image.open(io.BytesIO(data)) for data in pd.read_parquet(folder / fresh.POOL_NAME)["picture"]]
    assert len(pictures) == 8 * 4 and {picture.size for picture in pictures} == {(48, 48)}

    # What is there is not made again, and a line that was cut short is.
    whole = file.read_bytes()
    fresh.main(args)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-20])
    fresh.main(args)
    again = protocol.load_runs(file)
    assert again.keys() == runs.keys() and again["tiny-judged-10"]["test"] == judged["test"]

    monkeypatch.setattr(fresh, "run_seed", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="study tiny failed.*division by zero"):
        fresh.main(args)
