"""`idist bench`: every collective is measured and checked, whoever starts the ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from idist import collectives
from idist.cli import bench, main, measure
from idist.errors import ConfigError
from idist.testing import run_threads

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = ("--maxbytes", "64", "--turns", "1")
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run(
    *arguments: str, launcher: tuple[str, ...] = (), folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "-m", "idist", "bench", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in UNSET},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_starts_processes_compares_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    done = run("--nproc", "2", *SMALL, "--compare", "gloo,cpu:gloo,nccl", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    for name in measure.COLLECTIVES:
        assert done.stdout.count(f"\n{name}\n") == 2, "a table for each backend"
    assert "backend gloo on cpu; 2 ranks on 1 node, started by spawn" in done.stdout
    assert "collective" in done.stdout
    assert "cpu:gloo (us)" in done.stdout
    assert "backend nccl was not measured: " in done.stdout
    assert done.stdout.endswith("All results were right.\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attaches_to_what_a_launcher_has_started() -> None:
    done = run("--json", *SMALL, "--collectives", "all_reduce,all_gather", "--dtype", "int64", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    (result,) = data["results"]
    assert (result["backend"], result["ranks"], data["not_run"]) == ("gloo", 2, {})
    assert [(row["collective"], row["size"], row["count"]) for row in result["rows"]] == [
        ("all_reduce", 16, 2), ("all_reduce", 64, 8), ("all_gather", 16, 2), ("all_gather", 64, 8),
    ]  # fmt: skip
    for row in result["rows"]:
        n = result["ranks"]
        factor = 2 * (n - 1) / n if row["collective"] == "all_reduce" else (n - 1) / n
        assert row["wrong"] == 0
        assert row["algbw"] == pytest.approx(row["size"] / row["time_us"] / 1000)
        assert row["busbw"] == pytest.approx(row["algbw"] * factor)


@pytest.mark.parametrize("command", re.findall(r"^    idist (bench .*)$", PAGE.read_text(), re.MULTILINE))
def test_the_commands_of_the_page_run(command: str, tmp_path: Path) -> None:
    """At the smallest size; what they print is another on every machine."""
    done = run(*command.split()[1:], *SMALL, "--minbytes", "8", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists() == ("--plot" in command)


def plan(**changes: Any) -> measure.Plan:
    usual = {"collectives": tuple(measure.COLLECTIVES), "sizes": (8, 512), "dtype": "float32", "op": "SUM", "turns": 1}
    return measure.Plan(**{**usual, **changes})


@pytest.mark.parametrize("op", measure.OPS)
@pytest.mark.parametrize("dtype", measure.DTYPES)
def test_right_results_are_right(op: str, dtype: str) -> None:
    for result in run_threads(measure.measure, 3, 0, plan(op=op, dtype=dtype), None):
        assert {row.collective for row in result.rows} == set(measure.COLLECTIVES)
        assert [row.wrong for row in result.rows] == [0] * 2 * len(measure.COLLECTIVES)
        assert all(row.count % 3 == 0 for row in result.rows)


@pytest.mark.parametrize("name", measure.COLLECTIVES)
def test_a_wrong_element_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(collectives, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        if hasattr(result, "numel") and result.numel() == 8:
            result[3] += 1
        return result

    monkeypatch.setattr(collectives, name, wrong)
    sizes = (64,) if name in ("reduce_scatter", "scatter") else (32,)
    for result in run_threads(measure.measure, 2, 0, plan(collectives=(name,), sizes=sizes), None):
        assert [row.wrong for row in result.rows] == [1 if name == "gather" else 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one process has nobody to talk to: `idist bench --nproc 2`"),
        (["--nproc", "2", "--collectives", "all_redcue"], "collective 'all_redcue' is unknown"),
        (["--nproc", "2", "--minbytes", "4K", "--maxbytes", "1K"], "--minbytes 4096 is more than --maxbytes 1024"),
        (["--nproc", "2", "--compare", "a,b", "--backend", "a"], "leave --backend out"),
        (["--nproc", "2", "--backend", "xyzzy"], "backend 'xyzzy' is unknown"),
    ],
)
def test_what_does_not_fit_together(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_processes_of_a_launcher_are_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="a launcher has started 2 already"):
        bench._attached(nproc=2)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--nproc", "2", "--plot", "out.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("8", 8), ("4K", 4096), ("16m", 16 << 20), ("1GB", 1 << 30)])
def test_sizes(text: str, size: int) -> None:
    assert bench._bytes(text) == size
