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

import method
from PIL import Image


def test_the_picture_is_the_same_every_time(tmp_path):
    for name in ("first.png", "second.png"):
        method.draw_method(tmp_path / name)
    first, second = (Image.open(tmp_path / name).tobytes() for name in ("first.png", "second.png"))
    assert first == second and len(set(first)) > 100
