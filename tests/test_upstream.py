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

"""`make upstream` writes an example into a checkout of Diffusers that passes its checks and runs from there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


# The settings of ruff in Diffusers' repository, without its paths.
SETTINGS = """
[tool.ruff]
line-length = 119

[tool.ruff.lint]
ignore = ["C901", "E501", "E721", "E741", "F402", "F823"]
select = ["C", "E", "F", "I", "W"]

[tool.ruff.lint.isort]
lines-after-imports = 2
known-first-party = ["diffusers"]
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make_upstream(checkout):
    # The environment is the one of this very Python: none is set up.
    variables = [f"BIN={Path(sys.executable).parent}", f"DIFFUSERS={checkout}"]
    command = ["make", "--assume-old", ".venv/installed", *variables, "upstream"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "diffusers"
    (folder / "src/diffusers").mkdir(parents=True)
    (folder / "src/diffusers/__init__.py").touch()
    (folder / "pyproject.toml").write_text(SETTINGS)
    return folder


def test_the_example_passes_the_checks_and_trains(checkout):
    result = make_upstream(checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = checkout / "examples/research_projects/ncp_dpo"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "ncp_loss.py",
        "preference_pairs.py",
        "requirements.txt",
        "tests",
        "train_ncp_dpo_sd15.py",
        "train_ncp_dpo_sdxl.py",
    }
    assert "![" not in (folder / "README.md").read_text(encoding="utf-8")

    # Its own tests, of which one launches the script, with nothing of this repository in reach.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tests = ["test_copies.py::test_everything_equal_is_marked"]
    tests += ["test_ncp_dpo_training.py::test_every_loss_trains_a_lora[sd15-dpo-latent]"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--confcutdir", "tests"]
    command += [f"tests/{test}" for test in tests]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_what_the_checks_find_fails(checkout):
    (checkout / "examples/research_projects/ncp_dpo").mkdir(parents=True)
    (checkout / "examples/research_projects/ncp_dpo/other.py").write_text("import os\n")
    result = make_upstream(checkout)
    assert result.returncode != 0 and "F401" in result.stdout


@pytest.mark.bad_input
def test_what_is_no_checkout_is_refused(tmp_path):
    result = make_upstream(tmp_path)
    assert result.returncode != 0 and f"DIFFUSERS={tmp_path} is no checkout of diffusers" in result.stdout
    assert not list(tmp_path.iterdir())
