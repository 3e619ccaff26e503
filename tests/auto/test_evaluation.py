"""Exact evaluation, and training where ranks run out of batches at different times."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import idist
from idist.errors import ConfigError
from idist.testing import run_processes, run_threads

SAMPLES = 10_007


def model() -> nn.Module:
    torch.manual_seed(0)
    # Buffers: DistributedDataParallel broadcasts them at every forward, in evaluation too, so the ranks have to take
    # equally many steps. In doubles, so that how many samples a batch has does not turn a prediction.
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)).double()


def evaluate(batch_size: int, num_workers: int = 0) -> tuple[float, float, list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(5, (SAMPLES,), generator=generator)
    data = TensorDataset(images, labels, torch.arange(SAMPLES))
    loader = idist.auto_dataloader(data, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    network = idist.auto_model(model()).eval()
    predictions, indices, right, seen = [], [], 0, 0
    for x, y, index in loader:
        predictions.append(network(x).argmax(1))
        indices.append(index)
        right += int((predictions[-1] == y).sum())
        seen += len(y)
    assert len(predictions) == len(loader)
    everywhere = idist.all_gather(torch.stack([torch.cat(indices), torch.cat(predictions)], 1), uneven=True)
    accuracy = idist.reduce_mean(right, seen)
    by_class = idist.reduce_mean(torch.bincount(torch.cat(predictions), minlength=5), seen)
    return accuracy, float(by_class.sum()), sorted(map(tuple, everywhere.tolist()))


@pytest.mark.parametrize(
    ("world_size", "batch_size", "num_workers"),
    [
        (2, 64, 2),
        (3, 64, 0),
        (4, 64, 0),
        # Here the ranks' batches come out even, but for the last one to three samples.
        (2, 10_006, 0),
        (3, 15, 0),
        (4, 164, 0),
    ],
)
def test_evaluation_is_the_same_on_any_number_of_ranks(world_size: int, batch_size: int, num_workers: int) -> None:
    """Row 7: every sample once; the very same accuracy and predictions as on one rank."""
    alone = evaluate(64)
    assert [index for index, _ in alone[2]] == list(range(SAMPLES))
    assert 0.1 < alone[0] < 0.4
    for each in run_processes(evaluate, world_size, batch_size, num_workers, backend="gloo"):
        assert each == alone


def train_joined() -> tuple[int, list[list[float]]]:
    data = TensorDataset(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3)
    loader = idist.auto_dataloader(data, batch_size_per_rank=1, uneven="join")
    network = idist.auto_model(nn.Linear(4, 3))
    optimizer = idist.auto_optim(torch.optim.SGD(network.parameters(), lr=0.1))
    for _ in range(3):
        with idist.join(network):
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(network(x), y).backward()
                optimizer.step()
    (weight,) = (value for name, value in network.named_parameters() if name.endswith("weight"))
    return len(loader), weight.tolist()


def test_a_rank_that_has_no_more_batches_does_not_stop_the_others() -> None:
    lengths, weights = zip(*run_processes(train_joined, 3, backend="gloo"), strict=True)
    assert lengths == (2, 2, 1)
    assert weights[0] == weights[1] == weights[2]
    ((alone, _),) = run_processes(train_joined, 1, backend="gloo")
    assert alone == 5


def test_only_what_can_join() -> None:
    def fn() -> None:
        with pytest.raises(ConfigError, match=r"got Linear.*uneven='pad' or 'drop'"):
            idist.join(nn.Linear(1, 1))
        with pytest.raises(ConfigError, match="got nothing"):
            idist.join()

    run_threads(fn, 2)


def test_predictions_of_a_rank_without_samples() -> None:
    def fn() -> Any:
        loader = idist.auto_dataloader(list(range(2)), batch_size=3, uneven="join")
        mine = torch.tensor([int(i) for batch in loader for i in batch], dtype=torch.int64)
        return idist.all_gather(mine, uneven=True).tolist(), idist.reduce_mean(int(mine.sum()), len(mine))

    assert run_threads(fn, 3) == [([0, 1], 0.5)] * 3
