"""torch_xla that is not here, or not for this torch: what is said, and what nobody has to notice."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

import idist
from idist.backends.xla import Xla
from idist.errors import BackendUnavailable


def why() -> str:
    with pytest.raises(BackendUnavailable) as caught:
        idist.initialize("xla-tpu", rank=0, world_size=1)
    return str(caught.value)


@pytest.mark.skipif(Xla.installed(), reason="torch_xla is installed")
def test_not_installed() -> None:
    assert idist.has_xla_support is False
    assert not {"xla", "xla-tpu"} & set(idist.available_backends())
    assert "torch_xla is not installed" in why()
    assert "'torch==2.9.*' 'torch_xla[tpu]==2.9.*'" in why()


def test_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which versions fit together; nothing of it is imported, as that would fail in the loader."""
    (tmp_path / "torch_xla").mkdir()
    (tmp_path / "torch_xla" / "__init__.py").write_text("raise SystemExit('torch_xla was imported')")
    metadata = tmp_path / "torch_xla-1.5.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_xla\nVersion: 1.5.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert "xla-tpu" not in idist.available_backends()
    said = f"torch_xla 1.5.0 works with torch 1.5 only, and this is torch {torch.__version__}"
    assert said in why()
    assert "'torch==1.5.*' 'torch_xla[tpu]==1.5.*'" in why()
    from idist.cli import main

    assert main(["check", "--backend", "xla"]) == 1
    assert said in capsys.readouterr().out
