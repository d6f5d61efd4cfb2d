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

"""Every tool has number flags with a range, a help that is whole and quick, and answers mistakes in one line."""

import argparse
import contextlib
import subprocess
import sys

import collect_preferences
import compare_methods
import convert_lora
import encode_preferences
import eval_win_rate
import pictures
import plot_run
import prepare_preferences
import pytest
from conftest import ROOT, reset_accelerate, run_tool


# encode_preferences is the last: its flags are those of the trainers, in a module that imports torch.
TOOLS = [collect_preferences, compare_methods, convert_lora, eval_win_rate, plot_run, prepare_preferences]
TOOLS.append(encode_preferences)
# Values out of range that have the right type. It is 0 for the other flags.
BEYOND = {
    "--seed": 2**63,
    "--guidance_scale": -0.1,
    "--min_margin": -0.1,
    "--min_margin_quantile": 1.1,
    "--num_images": 1,
}


def find_parsers():
    """The parsers of all tools and of their commands."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "parse_args", lambda parser, words: parsers.append(parser) or parser.exit()
        )
        for tool in TOOLS:
            patch.setattr(sys, "argv", [f"{tool.__name__}.py"])
            with contextlib.suppress(SystemExit):
                tool.parse_args([])
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return parsers


def find_number_flags():
    """`(parser, flag)` of all flags that take a number."""
    flags = []
    for parser in find_parsers():
        for action in parser._actions:
            default = action.default[0] if isinstance(action.default, list) else action.default
            if type(default) in (int, float) or getattr(action.type, "__name__", None) in ("int", "float"):
                flags.append((parser, action.option_strings[0]))
    return flags


@pytest.mark.parametrize("parser", find_parsers(), ids=lambda parser: parser.prog)
def test_help_has_a_line_and_the_default_of_every_flag(parser):
    # Words may be broken at hyphens.
    text = "".join(parser.format_help().split())
    assert text.isascii()
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action.option_strings
        values = action.default if isinstance(action.default, list) else [action.default]
        if action.option_strings and values[0] not in (None, argparse.SUPPRESS) and values[0] is not False:
            assert f"Default:{''.join(map(str, values))}." in text or "efault" in action.help, action.option_strings


def test_help_of_commands_has_their_examples():
    texts = {parser.prog.split(" ", 1)[1]: parser.format_help() for parser in find_parsers() if " " in parser.prog}
    command = "    python tools/prepare_preferences.py filter --dataset_name pick_a_pic --min_wins 2 "
    assert f"neither lost nor drew.\n\n{command}--output_file kept.parquet\n" in texts["filter"]
    lines = texts["draw"].partition("tools/collect_preferences.py draw ")[2].splitlines()
    assert lines[0].endswith(" \\") and lines[1].startswith("      --pretrained_model_name_or_path ")
    assert "collect_preferences.py judge --input_dir" in texts["judge"] and "py rate" not in texts["judge"]


def test_help_loads_no_model_library():
    code = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        importlib.import_module(name).parse_args(["--help"])
    print(name, len(text.getvalue()) > 100, *sorted({"accelerate", "diffusers", "peft", "torch", "transformers"} & sys.modules.keys()))
"""
    names = [tool.__name__ for tool in TOOLS]
    result = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT / "tools")
    expected = [f"{name} True" for name in names]
    assert result.stdout.splitlines() == [*expected[:-1], f"{expected[-1]} torch"], result.stderr


# A mistake that argparse does not find, and what the line says.
MISTAKES = {
    "collect_preferences draw": ("--prompts x --pretrained_model_name_or_path ./nowhere", "./nowhere is no hub id"),
    "collect_preferences judge": ("--input_dir nowhere", "--input_dir nowhere has no metadata.jsonl"),
    "compare_methods": ("nowhere.toml", "No such file or directory: 'nowhere.toml'"),
    "convert_lora": ("--lora_weights nowhere", "--lora_weights: there is no file nowhere"),
    "encode_preferences": ("--pretrained_model_name_or_path m", "exactly one of --dataset_name and --train_data_dir"),
    "eval_win_rate": ("--pretrained_model_name_or_path m", "Give one of --prompts, --prompts_file and --dataset_name"),
    "plot_run": ("nowhere", "there is no file nowhere/eval.csv"),
    "prepare_preferences check": ("", "give either --dataset_name or --train_data_dir"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_in_one_line(command, tmp_path, monkeypatch, capsys):
    reset_accelerate()
    (tool, *names), (words, message) = command.split(), MISTAKES[command]
    words = [*names, *words.split()]
    if tool in ("collect_preferences", "encode_preferences", "eval_win_rate"):
        words += ["--output_dir", str(tmp_path / "new")]
    for flags, text in ((words, message), ([*words, "--no_such_flag"], "unrecognized arguments: --no_such_flag")):
        assert run_tool(monkeypatch, ROOT / "tools" / f"{tool}.py", *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{tool}.py: error: ") and text in line


@pytest.mark.parametrize("tool", [tool.__name__ for tool in TOOLS])
def test_a_defect_keeps_its_traceback(tool, monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *words: int("defect"))
    with pytest.raises(ValueError, match="invalid literal"):
        run_tool(monkeypatch, ROOT / "tools" / f"{tool}.py")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "parser, flag", [pytest.param(*found, id=f"{found[0].prog} {found[1]}") for found in find_number_flags()]
)
def test_numbers_out_of_range(parser, flag, capsys):
    for value in ("two", "nan", "inf", "-inf", "-1", BEYOND.get(flag, 0)):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"{flag}={value}"])
        assert stop.value.code == 2
        assert f"argument {flag}: " in capsys.readouterr().err


def test_flags_of_all_tools_are_found():
    flags = {flag for _, flag in find_number_flags()}
    assert flags > {
        *BEYOND,
        "--batch_size",
        "--vae_encode_batch_size",
        "--min_wins",
        "--num_proc",
        "--max_shard_size_mb",
    }


@pytest.mark.bad_input
def test_pictures_have_sides_that_models_can_draw():
    assert pictures.RESOLUTION("40") == 40
    with pytest.raises(argparse.ArgumentTypeError, match="36, but must be a multiple of 8"):
        pictures.RESOLUTION("36")
