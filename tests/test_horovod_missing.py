"""Horovod that is not here, or not for this torch: what is said, and what nobody has to notice."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import idist
from idist.backends.horovod import Horovod
from idist.errors import BackendUnavailable

FIX = "tools/horovod-wheel.sh"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of packages that comes before all others."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return tmp_path


def install(site: Path, torch_version: str) -> None:
    """What pip leaves of a Horovod that was built for a torch; nothing of it may be imported."""
    (site / "horovod" / "torch").mkdir(parents=True)
    (site / "horovod" / "__init__.py").write_text("raise SystemExit('Horovod was imported')")
    (site / "horovod" / "torch" / "mpi_lib_v2.cpython-311-x86_64-linux-gnu.so").touch()
    (site / "horovod" / "metadata.json").write_text(json.dumps({"pytorch": torch_version}))
    importlib.invalidate_caches()


def why() -> str:
    with pytest.raises(BackendUnavailable) as caught:
        idist.initialize("horovod", rank=0, world_size=1)
    return str(caught.value)


@pytest.mark.skipif(Horovod.installed(), reason="Horovod is installed")
def test_not_installed() -> None:
    assert idist.has_hvd_support is False
    assert "horovod" not in idist.available_backends()
    assert "Horovod is not installed" in why()
    assert FIX in why()


def test_a_folder_of_its_name_is_no_horovod(site: Path) -> None:
    """Such as one in the current directory, where `python -m` looks first."""
    (site / "horovod").mkdir()
    (site / "horovod" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert not Horovod.installed()


def test_built_for_another_torch(site: Path) -> None:
    install(site, "1.13.1")
    assert Horovod.installed()
    assert "horovod" not in idist.available_backends()
    assert f"was built for torch 1.13.1, and this is {torch.__version__}" in why()
    assert FIX in why()


def test_without_numpy(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, torch.__version__)
    assert "horovod" in idist.available_backends()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numpy" else real(name, *rest))
    assert "horovod" not in idist.available_backends()
    assert "`pip install numpy`" in why()
