"""What the README says works as it stands there."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import idist

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "train.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (said,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert done.stdout == said


def test_the_commands_exist() -> None:
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_the_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_what_was_tried_is_what_was_recorded() -> None:
    """The table is the record of the suites' reports, made by tools/tried.py."""
    spec = importlib.util.spec_from_file_location("tried", ROOT / "tools" / "tried.py")
    assert spec is not None
    assert spec.loader is not None
    tried = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tried)
    record = json.loads(tried.RECORD.read_text())
    assert tried.placed(README, tried.table(record)) == README
    assert {launcher for suite in record.values() for launcher in suite["counts"]} <= set(tried.TESTS)


def test_names_of_the_pages_exist() -> None:
    """Every ``idist.name`` of the README and the pages is one, those of what is left behind aside."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    left_behind = {"utils", "comp_models", "launcher"}
    names = {name for page in pages for name in re.findall(r"\bidist\.([a-z_]\w*)", page.read_text())} - left_behind
    files = {file.stem for file in (ROOT / "src" / "idist").iterdir()}
    assert [name for name in sorted(names) if not hasattr(idist, name) and name not in files] == []
