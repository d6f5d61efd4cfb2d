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

"""Pages name links, files, commands and flags that exist."""

import argparse
import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from torch.distributed.run import get_args_parser


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("tools", "small_world", "benchmarks", "docs", "tests", "assets")
# Names of other projects' files and programs' flags.
OTHER_FILES = {"lpl_loss.py", "train_diffusion_dpo.py"}
OTHER_FLAGS = {"--confcutdir", "--nodes", "--ntasks", "--gpus", "--time", "--requeue", "--signal"}  # pytest, Slurm
FENCE = re.compile(r"^[> ]*```(\w*)\n(.*?)^[> ]*```$", re.M | re.S)
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """A page without its blocks of code and the markers of its tables."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", read(page)))


def code_spans(page):
    """Code within the lines of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page):
    """The commands of a page, as lists of words: lines of its bash blocks, and its code spans."""
    blocks = [block.replace("\\\n", "") for kind, block in FENCE.findall(read(page)) if kind == "bash"]
    lines = [line for block in blocks for line in block.splitlines()] + code_spans(page)
    lines = [line for line in lines if line.startswith(("python ", "accelerate launch", "make "))]
    return [shlex.split(line.replace("$MODEL", "MODEL"), comments=True) for line in lines]


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@functools.cache
def parser_of(script):
    """The parser of a script of ours, which is caught as it would parse; `None` for a script without `parse_args`."""
    module = importlib.import_module(Path(script).stem)
    if hasattr(module, "create_parser"):
        return module.create_parser()
    if not hasattr(module, "parse_args"):
        return None
    caught = []

    def catch(parser, words=None):
        caught.append(parser)
        raise KeyboardInterrupt

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch), contextlib.suppress(KeyboardInterrupt):
        module.parse_args([])
    return caught[0]


def with_commands(parser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from with_commands(command)


@functools.cache
def flags_of(script):
    """All flags of a script of ours."""
    if (parser := parser_of(script)) is None:
        return set(re.findall(r'"(--\w+)"', (ROOT / script).read_text(encoding="utf-8")))
    return {flag for part in with_commands(parser) for flag in part._option_string_actions}


def scripts():
    folders = [ROOT, *(ROOT / name for name in ("tools", "small_world", "benchmarks"))]
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return [str(path.relative_to(ROOT)) for path in paths if "__main__" in path.read_text(encoding="utf-8")]


def launcher_flags():
    parsers = launch_command_parser(), get_args_parser()
    return {flag for parser in parsers for flag in parser._option_string_actions}


def error_of(parser, words):
    """What a parser finds wrong with words, or an empty text."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            parser.parse_args(words)
        except SystemExit:
            return stderr.getvalue().splitlines()[-1]
    return ""


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page.name} links to {target}, and there is no {name}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}, and {path.name} has no such heading"


@pages
def test_files_exist(page):
    for span in code_spans(page):
        if not re.fullmatch(r"[\w./-]+", span):
            continue
        if "/" in span and span.split("/")[0] in FOLDERS:
            assert (ROOT / span).exists(), f"{page.name} names {span}"
        elif span.endswith(".py") and span not in OTHER_FILES:
            found = [*ROOT.glob(span), *(path for folder in FOLDERS for path in (ROOT / folder).rglob(span))]
            assert found, f"{page.name} names {span}"


@pages
def test_commands_run_what_exists(page):
    for words in commands(page):
        line = shlex.join(words)
        if words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            assert words[1] in targets, line
            continue
        start = next((index for index, word in enumerate(words) if word.endswith(".py")), len(words))
        if words[0] == "accelerate":
            unknown = {word for word in words[:start] if word.startswith("--")} - launcher_flags()
            assert not unknown, f"{page.name}: {unknown} in {line}"
        if start == len(words):
            continue
        script, rest = words[start], words[start + 1 :]
        assert (ROOT / script).is_file(), f"{page.name}: there is no {script}"
        unknown = {word for word in rest if word.startswith("--")} - flags_of(script)
        assert not unknown, f"{page.name}: {unknown} in {line}"
        if "…" not in rest and (parser := parser_of(script)) is not None:
            error = error_of(parser, rest)
            assert not error, f"{page.name}: {line}: {error}"


@pages
def test_flags_exist(page):
    known = launcher_flags() | OTHER_FLAGS | {flag for script in scripts() for flag in flags_of(script)}
    unknown = {flag for span in code_spans(page) for flag in FLAG.findall(span)} - known
    assert not unknown, f"{page.name} names {unknown}"


def test_both_trainers_have_the_flags_of_the_recipes():
    table = read(ROOT / "docs/recipes.md").split("## Our flags")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    flags = {flag for row in rows for flag in FLAG.findall(row)}
    assert len(flags) > 20
    assert flags <= flags_of("train_ncp_dpo_sd15.py") & flags_of("train_ncp_dpo_sdxl.py")


def test_every_loss_has_a_row_and_a_formula():
    import ncp_loss

    for page, heading in (("recipes.md", "## Which loss"), ("method.md", "## The losses")):
        section = read(ROOT / "docs" / page).split(f"{heading}\n")[1].split("\n## ")[0]
        rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
        assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == ncp_loss.LOSSES.keys(), page


def test_the_layout_names_what_is_in_the_code():
    paths = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    sources = "".join(read(path) for path in paths)
    section = read(ROOT / "docs/layout.md").split("## The way of a pair")[1]
    names = set(re.findall(r"`([A-Za-z]\w{2,})`", section))
    assert len(names) >= 30
    missing = {name for name in names if not re.search(rf"\b{name}\b", sources)}
    assert not missing


def test_python_imports_what_is_there():
    found = [match for page in PAGES for match in re.findall(r"from ncp_loss import (.+)", read(page))]
    assert found
    for names in found:
        module = importlib.import_module("ncp_loss")
        assert all(hasattr(module, name) for name in names.split(", ")), names


def test_the_page_for_diffusers_stands_alone():
    page = ROOT / "docs/upstream_README.md"
    targets = re.findall(r"\]\(([^)]+)\)", read(page))
    assert all(target.startswith("https://") for target in targets)
    # The page leaves this repository, so it has README's table and no link to it.
    start, end = "<!-- small-world: written by python small_world/report.py -->", "<!-- end small-world -->"
    ours, theirs = (read(path).split(start)[1].split(end)[0] for path in (ROOT / "README.md", page))
    assert ours == theirs
