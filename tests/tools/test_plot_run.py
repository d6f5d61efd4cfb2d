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

import plot_run
import pytest
from PIL import Image


def test_a_run_is_drawn(run_sd15):
    run_sd15(max_train_steps=2, validation_steps=1, num_eval_pairs=3, loss_space="latent")
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


@pytest.mark.parametrize("content", [None, "step,space,timesteps,loss\n"])
@pytest.mark.bad_input
def test_a_folder_without_measurements(tmp_path, content):
    if content is not None:
        (tmp_path / "eval.csv").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/eval.csv"):
        plot_run.main(plot_run.parse_args([str(tmp_path)]))
