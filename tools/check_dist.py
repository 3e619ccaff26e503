"""What is in dist/ can be published: contents, metadata, and the README's code on the installed wheel.

Run by `make dist`, with the Python of an environment in which the wheel, and not a clone, is installed.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".typed")}


def expect(what: str, found: object, expected: object) -> None:
    """Exit with both, unless they are equal."""
    if found != expected:
        sys.exit(f"{what}: expected {expected}, got {found}")


def check_wheel(wheel: Path) -> None:
    """Every file of the source and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expect("the wheel's modules", {name for name in names if not name.partition("/")[0].endswith("info")}, SOURCE)
    expect("the wheel's licence", any(name.endswith("licenses/LICENSE") for name in names), True)


def check_sdist(sdist: Path) -> None:
    """What it takes to build, test and document; nothing that a tool has left."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    expect("files of the sdist that are not kept in git", names - set(kept) - {"PKG-INFO"}, set())
    needed = {f"src/{name}" for name in SOURCE} | {
        "LICENSE",
        "README.md",
        "Makefile",
        "tests/conftest.py",
        "docs/conf.py",
    }
    expect("files that the sdist lacks", needed - names, set())


def check_installed() -> str:
    """The wheel, with its metadata, is what this Python imports; returns its README."""
    import idist

    about = importlib.metadata.metadata("idist")
    expect("the installed version", about["Version"], idist.__version__)
    expect("its licence", about["License-Expression"], "BSD-3-Clause")
    expect("whether a clone is imported", ROOT / "src" in Path(idist.__file__).parents, False)
    expect(
        "what it needs", [need for need in about.get_all("Requires-Dist", []) if "extra" not in need], ["torch>=2.9"]
    )
    return str(about["Description"] or about.get_payload())


def run_readme(text: str) -> None:
    """The code of the README prints what the README says, in an empty folder."""
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "example.py").write_text(example)
        done = subprocess.run([sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, timeout=200)
        expect("the example's output", done.stdout + done.stderr * bool(done.returncode), printed)
        command = [str(Path(sys.executable).with_name("idist")), "check", "--json"]
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, timeout=200, check=True)


if __name__ == "__main__":
    (wheel,), (sdist,) = (list((ROOT / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    check_wheel(wheel)
    check_sdist(sdist)
    run_readme(check_installed())
    print(f"{wheel.name} and {sdist.name} can be published")
