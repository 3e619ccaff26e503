"""Tests that need a CUDA device: run when asked for, with ``-m gpu``, and then they do not skip."""

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    assert torch.cuda.is_available(), f"these tests need a CUDA device, and torch {torch.__version__} sees none"
