"""Keeps what the two scripts share word for word equal: `python tests/test_copies.py` copies it anew."""

import ast
import functools
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SOURCE, COPY = ROOT / "train_ncp_dpo_sd15.py", ROOT / "train_ncp_dpo_sdxl.py"
MARKER = f"# Copied from {SOURCE.stem}."


@functools.cache
def definitions(path):
    """Top-level functions and classes by name, as (first line, last line), decorators included, counted from 0."""
    return {
        node.name: (min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def text(path, name):
    start, end = definitions(path)[name]
    return "\n".join(path.read_text().splitlines()[start:end])


def marked():
    return [line.removeprefix(MARKER) for line in COPY.read_text().splitlines() if line.startswith(MARKER)]


@pytest.mark.parametrize("name", marked())
def test_copy_equals_its_source(name):
    lines = COPY.read_text().splitlines()
    assert lines[definitions(COPY)[name][0] - 1] == MARKER + name
    assert text(COPY, name) == text(SOURCE, name), "run `make fix-copies`"


def test_everything_equal_is_marked():
    shared = definitions(SOURCE).keys() & definitions(COPY).keys()
    assert {name for name in shared if text(SOURCE, name) == text(COPY, name)} == set(marked())


if __name__ == "__main__":
    for name in marked():
        start, end = definitions(COPY)[name]
        lines = COPY.read_text().splitlines()
        lines[start:end] = text(SOURCE, name).splitlines()
        COPY.write_text("\n".join(lines) + "\n")
        definitions.cache_clear()
