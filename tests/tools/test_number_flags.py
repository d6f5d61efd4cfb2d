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

"""All number flags of all tools have a range."""

import argparse
import contextlib

import collect_preferences
import convert_lora
import encode_preferences
import eval_win_rate
import pictures
import plot_run
import prepare_preferences
import pytest


TOOLS = [collect_preferences, convert_lora, encode_preferences, eval_win_rate, plot_run, prepare_preferences]
# Values out of range that have the right type. It is 0 for the other flags.
BEYOND = {
    "--seed": 2**63,
    "--guidance_scale": -0.1,
    "--min_margin": -0.1,
    "--min_margin_quantile": 1.1,
    "--num_images": 1,
}


def find_number_flags():
    """`(parser, flag)` of all flags of all tools and commands that take a number."""
    parsers, flags = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "parse_args", lambda parser, words: parsers.append(parser) or parser.exit()
        )
        for tool in TOOLS:
            with contextlib.suppress(SystemExit):
                tool.parse_args([])
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            default = action.default[0] if isinstance(action.default, list) else action.default
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif type(default) in (int, float) or getattr(action.type, "__name__", None) in ("int", "float"):
                flags.append((parser, action.option_strings[0]))
    return flags


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
