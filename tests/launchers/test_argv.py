"""``--local-rank=N``, which torch.distributed.launch adds unless it gets --use_env."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from idist.launchers.argv import drop_local_rank

ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1"}


@pytest.fixture
def left(tmp_path, monkeypatch):
    """The arguments that are left of those given."""

    def left(*arguments: str, script: str = "parser.add_argument('--lr')", env=ELASTIC) -> list[str]:
        path = tmp_path / "train.py"
        path.write_text(script)
        for name in ELASTIC:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        drop_local_rank()
        assert sys.argv[0] == str(path)
        return sys.argv[1:]

    return left


def test_is_taken_out(left) -> None:
    assert left("--local-rank=1", "--lr", "2") == ["--lr", "2"]


@pytest.mark.parametrize(
    "arguments",
    [("--local-rank=0",), ("--local_rank=1",), ("--lr", "--local-rank=1"), ("--local-rank", "1")],
)
def test_anything_else_is_the_users(left, arguments) -> None:
    assert left(*arguments) == list(arguments)


@pytest.mark.parametrize("env", [{}, {"LOCAL_RANK": "1"}, {"TORCHELASTIC_RUN_ID": "x"}])
def test_only_what_torchelastic_added(left, env) -> None:
    assert left("--local-rank=1", env=env) == ["--local-rank=1"]


@pytest.mark.parametrize("option", ["--local-rank", "--local_rank"])
def test_a_script_that_knows_it_gets_it(left, option: str) -> None:
    assert left("--local-rank=1", script=f"parser.add_argument('{option}', type=int)") == ["--local-rank=1"]


def test_no_script_to_read(monkeypatch) -> None:
    """With ``-m`` the package is imported before Python knows the file of the module."""
    for name, value in ELASTIC.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["-m", "--local-rank=1"])
    drop_local_rank()
    assert sys.argv == ["-m", "--local-rank=1"]


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_with_the_real_launcher(tmp_path: Path, known: bool) -> None:
    script = tmp_path / "train.py"
    declared = "parser.add_argument('--local-rank', type=int)\n" if known else ""
    script.write_text(
        "import argparse, json\nimport idist\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr')\n"
        f"{declared}print(json.dumps(vars(parser.parse_args())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.launch", "--master-port=0", str(script), "--lr=1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ({"lr": "1", "local_rank": 0} if known else {"lr": "1"})
