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


import eval_win_rate
import pytest
import scorers
from conftest import ROOT
from PIL import Image
from scenes import RESOLUTION, SCENES


IMAGES = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 200)]
PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def own(tmp_path):
    """Writes a file of a user's scorers, and loads scorers by the values of the flag."""

    def load(source, *texts):
        (tmp_path / "mine.py").write_text(source)
        texts = texts or (f"{tmp_path / 'mine.py'}:redness",)
        words = ["--pretrained_model_name_or_path", "none", "--scorers", *texts]
        return scorers.load_scorers(eval_win_rate.parse_args(words))

    return load


REDNESS = "def redness(images, prompts):\n    return [image.getpixel((0, 0))[0] + len(prompt) for image, prompt in zip(images, prompts)]\n"


@pytest.mark.parametrize(
    "kind",
    ["[{}]", "numpy.array([{}])", "torch.tensor([{}])", "[torch.tensor(x) for x in [{}]]"],
    ids=["list", "array", "tensor", "tensors"],
)
def test_a_users_function_scores(own, kind):
    values = kind.format("image.getpixel((0, 0))[0] + len(prompt) / 7 for image, prompt in zip(images, prompts)")
    (scorer,) = own(f"import numpy, torch\ndef redness(images, prompts):\n    return {values}\n").values()
    assert scorer(PROMPTS, IMAGES).tolist() == pytest.approx([10 + 5 / 7, 200 + 5 / 7], rel=1e-6)


def test_a_changed_file_is_another_version(own, tmp_path):
    first, again, changed = (own(source)["mine.redness"] for source in (REDNESS, REDNESS, REDNESS.replace("+", "-")))
    assert first.version == again.version != changed.version
    assert first.version.startswith("mine.py:redness@") and str(tmp_path) not in first.version
    assert first(PROMPTS, IMAGES).tolist() == [15, 205] and changed(PROMPTS, IMAGES).tolist() == [5, 195]


def test_functions_of_one_file_share_it(own):
    file = ROOT / "small_world" / "judges.py"
    loaded = own("", f"{file}:total", f"{file}:noisy_total", f"{file}:total")
    assert list(loaded) == ["judges.total", "judges.noisy_total"]
    total, noisy = (scorer.function for scorer in loaded.values())
    assert total.__globals__ is noisy.__globals__
    image = Image.new("RGB", (RESOLUTION, RESOLUTION), "red")
    assert 0 < loaded["judges.total"]([SCENES[0].caption], [image]).item() < 20


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "source, message",
    [
        ("def other(images, prompts): pass", "mine.py has no function redness. It has other."),
        ("redness = 3", "has no function redness. It has none."),
        ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this"),
        (
            "def redness(images, prompts): return [1.0]",
            r"returned scores of shape \(1,\) for 2 images, but must return one",
        ),
        ("def redness(images, prompts): return [[1.0]] * 2", r"of shape \(2, 1\) for 2 images"),
        ("def redness(images, prompts): return ['a', 'b']", r"returned \['a', 'b'\], but must return one number"),
        ("def redness(images, prompts): return None", "returned None, but must return one number"),
    ],
    ids=["function", "callable", "import", "count", "shape", "text", "none"],
)
def test_functions_that_do_not_score_are_named(own, source, message):
    with pytest.raises(ValueError, match=f"--scorers .*mine.py:redness.*{message}"):
        own(source)["mine.redness"](PROMPTS, IMAGES)


@pytest.mark.bad_input
def test_an_error_in_a_users_function_keeps_its_traceback(own):
    with pytest.raises(
        RuntimeError, match="--scorers .*mine.py:redness failed for 2 images, the first of 'a cat'"
    ) as raised:
        own("def redness(images, prompts): return [1 / 0]")["mine.redness"](PROMPTS, IMAGES)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@pytest.mark.bad_input
def test_flags_that_name_no_scorer(own, tmp_path, capsys):
    for text in ("pickscor", "mine.py", "mine.py:", "mine.py:a-b", "mine:redness"):
        with pytest.raises(SystemExit):
            own("", text)
        error = " ".join(capsys.readouterr().err.split())
        assert f"argument --scorers: {text}, but must be pickscore, clipscore" in error and "file.py:function" in error
    with pytest.raises(ValueError, match="--scorers nowhere.py:redness: there is no file nowhere.py"):
        own("", "nowhere.py:redness")
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path, tmp_path / "folder"):
        (folder / "mine.py").write_text(REDNESS)
    with pytest.raises(ValueError, match="are both called mine.redness. Rename one of the files"):
        own(REDNESS, *(f"{folder / 'mine.py'}:redness" for folder in (tmp_path, tmp_path / "folder")))
