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

"""A run's measurements become a picture."""

import importlib.metadata
import shutil

import numpy as np
import plot_run
import pytest
from PIL import Image


def test_a_run_is_drawn(run_sd15, capsys):
    run_sd15(max_train_steps=2, validation_steps=1, num_eval_pairs=3, loss_space="latent")
    curves = plot_run.find_curves(plot_run.read_training(run_sd15.output_dir))
    assert list(curves) == list(plot_run.PANELS)
    for panel in ("loss", "implicit accuracy"):
        np.testing.assert_allclose(curves[panel], [[1, 2], run_sd15.scalars(panel.replace(" ", "_"))])
    sizes = []
    for name in (None, "curves.jpg"):
        words = [str(run_sd15.output_dir)]
        file = run_sd15.output_dir / (name or "run.png")
        words += [] if name is None else ["--output_file", str(file)]
        plot_run.main(plot_run.parse_args(words))
        with Image.open(file) as picture:
            assert picture.format == ("PNG" if name is None else "JPEG")
            sizes.append(picture.size)
            assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50
    assert sizes[0] == sizes[1]
    # With another tracker than TensorBoard.
    shutil.rmtree(run_sd15.output_dir / "logs")
    capsys.readouterr()
    plot_run.main(plot_run.parse_args([str(run_sd15.output_dir)]))
    assert "has no files of TensorBoard: the picture shows held-out pairs alone" in capsys.readouterr().out


def test_drift_is_a_share_of_the_references_error():
    rows = [{"step": 0, "error_w": 2.0, "drift_w": 0.0}, {"step": 5, "error_w": 3.0, "drift_w": 1.0}]
    curves = plot_run.find_curves(rows)
    assert list(curves) == ["drift of winners"], "no panel without values"
    np.testing.assert_allclose(curves["drift of winners"], [[0, 5], [0, 0.5]])


def test_noise_is_averaged():
    steps, values, width = plot_run.running_mean(np.arange(1, 41), np.arange(40) % 4)
    assert width == 4 and len(steps) == len(values) == 37
    np.testing.assert_allclose(values, 1.5)
    assert steps[0] == 2.5
    assert plot_run.running_mean(np.array([1, 2]), np.array([3.0, 4.0]))[1].tolist() == [3, 4]


@pytest.mark.bad_input
def test_matplotlib_is_asked_for(tmp_path, monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    with pytest.raises(ImportError, match="matplotlib is needed, .*`pip install -r tools/requirements.txt`"):
        plot_run.main(plot_run.parse_args([str(tmp_path)]))


@pytest.mark.parametrize("content", [None, "step,space,timesteps,loss\n"])
@pytest.mark.bad_input
def test_a_folder_without_measurements(tmp_path, content):
    if content is not None:
        (tmp_path / "eval.csv").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/eval.csv"):
        plot_run.main(plot_run.parse_args([str(tmp_path)]))
