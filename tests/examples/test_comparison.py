"""docs/comparison.md is true of the files that it compares; that they print what it says is run with the README."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text()
FILES = {
    "idist": ROOT / "examples" / "spirals.py",
    "torch": ROOT / "examples" / "bare_torch" / "spirals.py",
    "Horovod": ROOT / "examples" / "bare_horovod" / "spirals.py",
    "torch_xla": ROOT / "examples" / "bare_xla" / "spirals.py",
}
SAME = ("spirals", "network")
OPTIONS = ["--backend", "--nproc_per_node", "--log_interval", "--nb_samples", "--batch_size"]


def lines(name: str) -> list[str]:
    return [line.strip() for line in FILES[name].read_text().splitlines() if line.strip()]


def functions(name: str) -> dict[str, str]:
    return {
        node.name: ast.unparse(node)
        for node in ast.parse(FILES[name].read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


def row(title: str) -> list[str]:
    (found,) = re.findall(rf"^\|\s*{re.escape(title)}\s*\|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


def test_the_lines_are_counted() -> None:
    assert row("") == list(FILES)
    everywhere = set.intersection(*(set(lines(name)) for name in FILES))
    own = [sum(line not in everywhere for line in lines(name)) for name in FILES]
    assert row("lines that not all have") == list(map(str, own))
    assert row("lines in all") == [str(len(lines(name))) for name in FILES]


@pytest.mark.parametrize("name", FILES)
def test_what_is_quoted_is_in_the_file(name: str) -> None:
    quoted = 0
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        (part,) = re.findall(rf"^# {name}\n(.*?)(?:^# |\Z)", block, re.DOTALL | re.MULTILINE)
        for line in filter(None, map(str.strip, part.splitlines())):
            assert line in lines(name)
            quoted += 1
    assert quoted >= 5


@pytest.mark.parametrize("name", FILES)
def test_it_is_the_same_training_with_the_same_options(name: str) -> None:
    ours, theirs = functions("idist"), functions(name)
    assert [theirs[function] for function in SAME] == [ours[function] for function in SAME]
    for found in (ours, theirs):
        assert re.findall(r"'(--\w+)'", found["arguments"]) == OPTIONS


def test_they_print_the_same() -> None:
    """tests/xla compares what torch_xla prints, on the one device that it has there."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    printed = [tuple(block.replace("[0]<stdout>:", "").splitlines()[1:]) for block in blocks]
    assert len(printed) == 3
    assert len(set(printed)) == 1
