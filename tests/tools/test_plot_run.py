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

"""What a run wrote becomes a picture."""

import plot_run
import pytest
from PIL import Image


@pytest.mark.parametrize("kept", [{"eval.csv", "timesteps.csv"}, {"eval.csv"}, {"timesteps.csv"}])
def test_a_run_is_drawn(run_sd15, kept):
    options = {"num_eval_pairs": 3, "timestep_weighting": "balanced", "loss_space": "latent"}
    run_sd15(max_train_steps=2, validation_steps=1, **options)
    for name in {"eval.csv", "timesteps.csv"} - kept:
        (run_sd15.output_dir / name).unlink()
    plot_run.main(plot_run.parse_args([str(run_sd15.output_dir)]))
    with Image.open(run_sd15.output_dir / "run.png") as picture:
        width, height = picture.size
        assert height > (0.35 if len(kept) == 2 else 0.2) * width
        assert len(picture.convert("RGB").getcolors(width * height)) > 50


@pytest.mark.bad_input
def test_a_folder_without_measurements(tmp_path):
    with pytest.raises(ValueError, match=r"neither eval.csv \(--num_eval_pairs\) nor timesteps.csv"):
        plot_run.main(plot_run.parse_args([str(tmp_path)]))
