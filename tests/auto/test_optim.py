"""auto_optim: with backends that synchronise in the model, the optimizer itself."""

from typing import Any

import pytest
import torch
import torch._dynamo  # every optimizer imports it, and it then sets a variable: not within a test

import idist
from idist.backends.serial import Serial
from idist.runtime import Context, thread_context
from idist.testing import run_threads
from idist.topology import SERIAL


def made() -> tuple[torch.nn.Linear, torch.optim.SGD]:
    model = torch.nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_the_optimizer_itself(world_size: int) -> None:
    """KNOWN-FAILURES 13: what it does not wrap it cannot break."""

    def work() -> None:
        model, optimizer = made()
        adapted = idist.auto_optim(optimizer)
        assert adapted is optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(adapted, step_size=1, gamma=0.1)

        def closure() -> torch.Tensor:
            adapted.zero_grad()
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            return loss

        assert isinstance(adapted.step(closure), torch.Tensor)
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([0.05])
        state = adapted.state_dict()
        assert state["state"][0]["momentum_buffer"].tolist() == [[1, 1]]
        again = idist.auto_optim(made()[1])
        again.load_state_dict(state)
        assert again.param_groups[0]["lr"] == pytest.approx(0.05)

    if world_size == 1:
        work()
    else:
        run_threads(work, world_size)


class Wrapped(torch.optim.SGD):
    compression: str


class Reducing(Serial):
    """Reduces gradients in the optimizer."""

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer, **options: Any) -> torch.optim.Optimizer:
        wrapped = Wrapped(optimizer.param_groups, lr=0.5)
        wrapped.compression = options.pop("compression", "none")
        self._reject(options)
        return wrapped


def test_a_backend_may_wrap_it() -> None:
    with thread_context(Context(Reducing(), SERIAL, owned=True)):
        adapted = idist.auto_optim(made()[1], compression="fp16")
        assert isinstance(adapted, Wrapped)
        assert adapted.compression == "fp16"


@pytest.mark.parametrize("world_size", [1, 2])
def test_unknown_arguments_raise(world_size: int) -> None:
    with pytest.raises(TypeError, match="does not know the option 'compression'"):
        run_threads(lambda: idist.auto_optim(made()[1], compression="fp16"), world_size)
    with pytest.raises(TypeError, match="does not know the option 'compression'"):
        idist.auto_optim(made()[1], compression="fp16")


@pytest.mark.parametrize("optimizer", [None, "sgd", torch.optim.SGD, torch.nn.Linear(1, 1)])
def test_only_optimizers(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"auto_optim takes a torch\.optim\.Optimizer, got"):
        idist.auto_optim(optimizer)
