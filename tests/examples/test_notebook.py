"""The notebook of the examples, run in a kernel of its own: every cell gives what is saved below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def outputs(notebook: Any) -> list[list[dict[str, Any]]]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[dict(output, execution_count=None) for output in cell.outputs] for cell in cells]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gives_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = outputs(notebook)
    assert sum(map(len, saved)) == 3
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert outputs(notebook) == saved
