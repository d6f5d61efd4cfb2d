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
import itertools
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from torch.distributed.run import get_args_parser


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "small_world/analysis.md")
FOLDERS = ("tools", "small_world", "benchmarks", "docs", "tests", "assets")
# Names of other projects' files and programs' flags.
OTHER_FILES = {"lpl_loss.py", "train_diffusion_dpo.py"}
OTHER_FLAGS = {
    "--confcutdir",
    "--nodes",
    "--ntasks",
    "--gpus",
    "--time",
    "--requeue",
    "--signal",
    "--include",
    "--logdir",
}  # pytest, Slurm, hf, tensorboard
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


def split_commands(lines):
    """The lines that are commands of ours, as lists of words."""
    lines = [line for line in lines if line.startswith(("python ", "accelerate launch", "make "))]
    return [shlex.split(line.replace("$MODEL", "MODEL"), comments=True) for line in lines]


def block_commands(text):
    """The commands in the bash blocks of a text."""
    blocks = [block.replace("\\\n", "") for kind, block in FENCE.findall(text) if kind == "bash"]
    return split_commands(line for block in blocks for line in block.splitlines())


def commands(page):
    """The commands of a page: in its bash blocks, and its code spans."""
    return block_commands(read(page)) + split_commands(code_spans(page))


def split_script(words):
    """A command's script and the words that follow it; `None` and none for other commands."""
    start = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    return (None, []) if start is None else (words[start], words[start + 1 :])


def section(page, heading):
    """The text below a heading of the second level."""
    return read(ROOT / page).split(f"\n## {heading}\n")[1].split("\n## ")[0]


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
        script, rest = split_script(words)
        if words[0] == "accelerate":
            launcher = words[: len(words) - len(rest)]
            unknown = {word for word in launcher if word.startswith("--")} - launcher_flags()
            assert not unknown, f"{page.name}: {unknown} in {line}"
        if script is None:
            continue
        missing = [
            word for word in (script, *rest) if word.split("/")[0] in FOLDERS and not list(ROOT.glob(word.rstrip("/")))
        ]
        assert (ROOT / script).is_file() and not missing, f"{page.name}: there is no {missing or script}"
        unknown = {word for word in rest if word.startswith("--")} - flags_of(script)
        assert not unknown, f"{page.name}: {unknown} in {line}"
        if "…" not in rest and (parser := parser_of(script)) is not None:
            error = error_of(parser, rest)
            assert not error, f"{page.name}: {line}: {error}"


@pages
def test_the_first_command_of_a_kind_is_complete(page):
    seen = set()
    for words in block_commands(read(page)):
        script, rest = split_script(words)
        kind = script, *itertools.takewhile(lambda word: re.fullmatch("[a-z_]+", word), rest)
        assert kind in seen or "…" not in words, f"{page.name}: {shlex.join(words)}"
        seen.add(kind)


def test_all_pages_train_as_the_demo_does():
    import demo
    from protocol import METHODS

    recommended = {"loss_space": "ncp", **METHODS[demo.METHOD]}
    found = {}
    for page in PAGES:
        for words in block_commands(read(page)):
            script, rest = split_script(words)
            # Diffusers' page shows the paper's loss.
            if page.name != "upstream_README.md" and str(script).startswith("train_") and "…" not in rest:
                args = parser_of(script).parse_args(rest)
                assert args.loss_type == recommended["loss_type"], f"{page.name}: {shlex.join(words)}"
                assert args.loss_space == recommended["loss_space"], f"{page.name}: {shlex.join(words)}"
                found.setdefault(script, set()).add((args.beta_dpo, args.learning_rate, args.rank))
    # Latents of SDXL have four times as many elements.
    beta = found["train_ncp_dpo_sd15.py"].copy().pop()[0]
    assert found == {"train_ncp_dpo_sd15.py": {(beta, 1e-5, 64)}, "train_ncp_dpo_sdxl.py": {(4 * beta, 1e-5, 64)}}
    assert f"**Start with filtered pairs and `{recommended['loss_type']}`**" in section(
        "docs/recipes.md", "Which loss"
    )


@pages
def test_judges_do_not_evaluate(page):
    for part in read(page).split("\n## "):
        scorers = {"judge": set(), "evaluate": set()}
        for words in block_commands(part):
            script, rest = split_script(words)
            if script == "tools/eval_win_rate.py":
                scorers["evaluate"].update(parser_of(script).parse_args(rest).scorers)
            elif script == "tools/collect_preferences.py" and rest[0] == "judge":
                scorers["judge"].update(parser_of(script).parse_args(rest).scorers)
        assert scorers["judge"].isdisjoint(scorers["evaluate"]), f"{page.name}: {part.splitlines()[0]}"


def test_times_of_the_steps_follow_from_what_was_measured():
    models = json.loads(read(ROOT / "benchmarks/results/gpu_time.json"))["models"]
    lines = section("docs/first_lora.md", "What each step takes").splitlines()
    for column, model in ((2, "sd15 × 8"), (3, "sdxl × 8")):
        seconds = {name: 1 / row["pairs_per_second"] for name, row in models[model]["results"].items()}
        vae = seconds["latent DPO, VAE in the loop"] - seconds["latent DPO"]
        expected = {"4.": 2 * 6800 * vae, "5.": (1000 * 8 + 11 * 200 + 512) * seconds["NCP-CPO"]}
        for step, time in expected.items():
            (line,) = (line for line in lines if line.startswith(f"| {step}"))
            assert line.split(" | ")[column - 1] == f"{time / 60:.0f} min"


def test_pages_name_all_files_of_docs():
    text = "".join(read(page) for page in PAGES)
    for path in (path for path in (ROOT / "docs").rglob("*") if path.is_file()):
        assert re.search(rf"[(/`]{re.escape(path.name)}\b", text), f"no page names {path}"


@pages
def test_flags_exist(page):
    known = launcher_flags() | OTHER_FLAGS | {flag for script in scripts() for flag in flags_of(script)}
    unknown = {flag for span in code_spans(page) for flag in FLAG.findall(span)} - known
    assert not unknown, f"{page.name} names {unknown}"


def test_both_trainers_have_the_flags_of_the_recipes():
    table = section("docs/recipes.md", "Our flags")
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    flags = {flag for row in rows for flag in FLAG.findall(row)}
    assert len(flags) > 20
    assert flags <= flags_of("train_ncp_dpo_sd15.py") & flags_of("train_ncp_dpo_sdxl.py")


def test_every_loss_has_a_row_and_a_formula():
    import ncp_loss

    for page, heading in (("docs/recipes.md", "Which loss"), ("docs/method.md", "The losses")):
        rows = [line.split(" | ") for line in section(page, heading).splitlines() if line.startswith("| `")]
        assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == ncp_loss.LOSSES.keys(), page
    # The last page has the formulas of the docstrings.
    for name, formula, *_ in rows[1:]:
        loss = ncp_loss.LOSSES[name.strip("| `")]
        expected = re.sub(r" \([^()]*arXiv.*", "", loss.function.__doc__.strip()) + " + λ·e_w" * bool(loss.sft_weight)
        assert formula.replace("`", "").startswith(expected)


def test_the_layout_names_what_is_in_the_code():
    paths = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    sources = "".join(read(path) for path in paths)
    text = read(ROOT / "docs/layout.md").split("## The way of a pair")[1]
    names = set(re.findall(r"`([A-Za-z]\w{2,})`", text))
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
