"""Checkpoints, accumulation and clipping on Horovod, where torch has no process group."""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist

import idist

BATCHES, EVERY = 7, 3


@pytest.fixture
def folder() -> Iterator[str]:
    """One for all ranks."""
    with TemporaryDirectory() as own:
        yield idist.broadcast(own)
        idist.barrier()


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))


def batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 4, generator=generator) for _ in range(BATCHES)]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    norms = []
    for step, x in enumerate(batches(idist.get_rank())):
        with idist.accumulate(model, step, every=EVERY, total=BATCHES) as micro:
            (model(x).square().mean() * micro.scale).backward()
        if micro.last:
            norms.append(float(idist.clip_grad_norm_(model, 0.1)))
            optimizer.step()
            optimizer.zero_grad()
    return norms


def alone(size: int) -> tuple[torch.Tensor, list[float]]:
    """The same in one process with the batches of all ranks."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    everybody, norms = [torch.cat(parts) for parts in zip(*map(batches, range(size)), strict=True)], []
    for start in range(0, BATCHES, EVERY):
        rows = torch.cat(everybody[start : start + EVERY])
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), norms


def made(**options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = idist.auto_model(network())
    return model, idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), **options)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("options", [{}, {"backward_passes_per_step": EVERY}])
def test_accumulates_and_clips_as_one_process(options: dict[str, int]) -> None:
    """Also where Horovod waits for more passes than the last step has."""
    expected, expected_norms = alone(idist.get_world_size())
    model, optimizer = made(**options)
    assert train(model, optimizer) == pytest.approx(expected_norms, rel=1e-5)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-5)


def test_accumulates_sums(hvd: Any) -> None:
    """The sum over the ranks of what is a mean on each: clipped, the same step."""
    size = idist.get_world_size()
    expected, expected_norms = alone(size)
    model, optimizer = made(op=hvd.Sum)
    assert train(model, optimizer) == pytest.approx([norm * size for norm in expected_norms], rel=1e-5)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-5)


def test_only_the_last_pass_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a rank had no use for a parameter in an earlier one."""
    model: Any = idist.auto_model(torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in range(2)]))
    optimizer: Any = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=1.0))
    reduce, reduced = optimizer._allreduce_grad_async, []
    monkeypatch.setattr(optimizer, "_allreduce_grad_async", lambda p: (reduced.append(p), reduce(p))[1])
    counts = []
    for step in range(4):
        with idist.accumulate(model, step, every=2) as micro:
            used = model if micro.last else [model[idist.get_rank() % 2]]
            (sum(layer(torch.ones(1, 1)) for layer in used).sum() * micro.scale).backward()
        counts.append(len(reduced))
        if micro.last:
            assert idist.reduce_mean(sum(float(layer.weight.grad) for layer in model), 1) == pytest.approx(1.5)
            optimizer.step()
            optimizer.zero_grad()
    assert counts == [0, 2, 2, 4]


def test_goes_on_from_a_checkpoint(folder: str) -> None:
    assert not dist.is_initialized()
    model, optimizer = made()
    train(model, optimizer)
    idist.save(folder, model=model, optimizer=optimizer, step=BATCHES)
    train(model, optimizer)
    again, stepping = made()
    assert idist.load(folder, model=again, optimizer=stepping) == {"step": BATCHES}
    train(again, stepping)
    torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=0)


def test_says_that_it_cannot_write_in_the_background(folder: str) -> None:
    with pytest.raises(idist.ConfigError, match="async_op=True needs a process group of torch"):
        idist.save(folder, step=1, async_op=True)
