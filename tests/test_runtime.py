"""initialize, finalize, sync, and the process groups that users make themselves."""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import LOOPBACK, free_port, run_ranks

import idist
from idist import backends, runtime
from idist.backends.c10d import C10d
from idist.errors import BackendUnavailable, ConfigError, UnknownArgument
from idist.topology import Topology

SECONDS = 20.0
TIMEOUT = timedelta(seconds=SECONDS)


def everything() -> dict[str, Any]:
    """What every getter says; the message, where it raises."""
    getters = (
        idist.backend, idist.model_name, idist.get_rank, idist.get_world_size, idist.get_local_rank,
        idist.get_nproc_per_node, idist.get_nnodes, idist.get_node_rank,
    )  # fmt: skip
    return {getter.__name__: outcome(getter) for getter in getters} | {"device": str(idist.device())}


def expected(backend: str | None, rank: int, world_size: int, nodes: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
    names = ("get_local_rank", "get_nproc_per_node", "get_nnodes", "get_node_rank")
    return {
        "backend": backend,
        "model_name": "native-dist" if backend else "serial",
        "get_rank": rank,
        "get_world_size": world_size,
        "device": "cpu",
        **dict(zip(names, nodes, strict=True)),
    }


ALONE = expected(None, 0, 1, (0, 1, 1, 0))


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def weights(model: torch.nn.Module) -> list[float]:
    return torch.nn.utils.parameters_to_vector(model.parameters()).tolist()


def gradients_are_averaged(rank: int) -> bool:
    """Train one step through auto_model; the ranks' inputs and first weights differ."""
    torch.manual_seed(rank)
    model = idist.auto_model(torch.nn.Linear(2, 1, bias=False))
    model(torch.full((1, 2), float(rank))).sum().backward()
    (parameter,) = model.parameters()
    mean = (idist.get_world_size() - 1) / 2
    assert parameter.grad is not None
    same = idist.all_gather(parameter.detach())
    return bool((parameter.grad == mean).all() and (same == same[0]).all())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def torchrun(rank: int, hosts: str, port: int) -> dict[str, object]:
    """The variables of torchrun for a rank, where ``hosts`` has a letter for the host of each."""
    nodes = sorted(set(hosts))
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": rank,
        "WORLD_SIZE": len(hosts),
        "LOCAL_RANK": hosts[:rank].count(hosts[rank]),
        "LOCAL_WORLD_SIZE": hosts.count(hosts[rank]),
        "GROUP_RANK": nodes.index(hosts[rank]),
        "GROUP_WORLD_SIZE": len(nodes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": port,
    }


# Groups that the user made


def _in_a_group_by_tcp(rank: int, backend: str | None, port: int, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {"before": everything()}
    address = f"tcp://{LOOPBACK}:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=2, timeout=TIMEOUT)
    if rank == 1:
        wait_for(folder / "rank 0 has asked")
    seen["within"] = everything()
    (folder / "rank 0 has asked").touch()
    seen["trains"] = gradients_are_averaged(rank)
    seen["initialize"] = outcome(lambda: idist.initialize("gloo"))
    idist.new_group([0])
    idist.finalize()
    idist.finalize()
    seen["group is still there"] = dist.is_initialized() and idist.all_reduce(rank + 1) == 3
    dist.destroy_process_group()
    seen["after"] = everything()
    return seen


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", None])
def test_a_group_made_by_hand_is_recognised(backend: str | None, tmp_path: Path) -> None:
    """KNOWN-FAILURES 1: auto_model wraps; 14: the getters of rank 0 wait for nobody; 22: finalize leaves the group."""
    for rank, seen in enumerate(run_ranks(_in_a_group_by_tcp, 2, backend, free_port(), tmp_path)):
        assert seen["before"] == ALONE
        assert seen["within"] == expected("gloo", rank, 2, (rank, 2, 1, 0))
        assert seen["trains"]
        assert "exists already; you made it" in seen["initialize"]
        assert seen["group is still there"]
        assert seen["after"] == ALONE


def _in_a_group_by_file(rank: int, folder: Path, hosts: str) -> dict[str, Any]:
    runtime.socket.gethostname = lambda: f"host-{hosts[rank]}"  # type: ignore[attr-defined]
    world_size = len(hosts)
    address = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=TIMEOUT)
    if rank != 0:
        wait_for(folder / "rank 0 has asked")
    seen = {"unplaced": everything()}
    (folder / "rank 0 has asked").touch()
    idist.sync()
    seen["synced"] = everything()
    idist.sync()
    dist.destroy_process_group()
    seen["after"] = everything()
    return seen


@pytest.mark.parametrize("hosts", ["aab", "aba"])
def test_where_nothing_tells_the_nodes_sync_asks(hosts: str, tmp_path: Path) -> None:
    """KNOWN-FAILURES 10 and 14."""
    nodes = {"aab": [(0, 2, 2, 0), (1, 2, 2, 0), (0, 1, 2, 1)], "aba": [(0, 2, 2, 0), (0, 1, 2, 1), (1, 2, 2, 0)]}
    for rank, seen in enumerate(run_ranks(_in_a_group_by_file, 3, tmp_path, hosts)):
        unplaced = seen["unplaced"]
        assert (unplaced["get_rank"], unplaced["get_world_size"], unplaced["backend"]) == (rank, 3, "gloo")
        for name in ("get_local_rank", "get_nproc_per_node", "get_nnodes", "get_node_rank"):
            assert unplaced[name].startswith("LaunchError: ")
            assert "idist.sync() on every rank" in unplaced[name]
        assert seen["synced"] == expected("gloo", rank, 3, nodes[hosts][rank])
        assert seen["after"] == ALONE


def _in_a_group_with_variables(rank: int) -> dict[str, Any]:
    environ = dict(os.environ)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    seen = {"within": everything(), "trains": gradients_are_averaged(rank)}
    idist.sync()
    seen["synced"] = everything()
    idist.finalize()
    dist.destroy_process_group()
    seen["after"], seen["environ"] = everything(), dict(os.environ) == environ
    return seen


@pytest.mark.parametrize("hosts", ["aab", "aba"])
def test_the_variables_of_the_launcher_tell_the_nodes(hosts: str) -> None:
    """KNOWN-FAILURES 9: torchrun's variables count within a Slurm job; 10: also in cyclic placement."""
    port = free_port()

    def env(rank: int) -> dict[str, object]:
        step = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 1}
        return {**step, **torchrun(rank, hosts, port)}

    for rank, seen in enumerate(run_ranks(_in_a_group_with_variables, 3, env=env)):
        variables = torchrun(rank, hosts, port)
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "GROUP_RANK")
        place = tuple(variables[name] for name in names)
        assert seen["within"] == seen["synced"] == expected("gloo", rank, 3, place)  # type: ignore[arg-type]
        assert seen["trains"]
        assert seen["environ"]


def _in_a_fake_group(rank: int) -> dict[str, Any]:
    # torch's backend for dry runs: it is imported to be registered, and nothing is ever sent.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    return {"within": everything(), "initialize": outcome(lambda: idist.initialize("fake"))}


def test_a_fake_group_is_a_group_too() -> None:
    (seen,) = run_ranks(_in_a_fake_group, 1)
    assert (seen["within"]["backend"], seen["within"]["get_rank"], seen["within"]["get_world_size"]) == ("fake", 2, 4)
    assert "ConfigError" in seen["initialize"]


def _with_a_hint(rank: int, folder: Path) -> dict[str, Any]:
    idist.set_local_rank(rank + 4)
    seen = {"before": idist.get_local_rank()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=TIMEOUT)
    seen["within"] = idist.get_local_rank()
    seen["nodes"] = outcome(idist.get_nnodes)
    dist.destroy_process_group()
    seen["after"] = idist.get_local_rank()
    return seen


def test_set_local_rank_is_for_groups_made_by_hand(tmp_path: Path) -> None:
    for rank, seen in enumerate(run_ranks(_with_a_hint, 2, tmp_path)):
        assert seen["before"] == seen["after"] == 0, "one process on its own has local rank 0, whatever was said"
        assert seen["within"] == rank + 4
        assert seen["nodes"].startswith("LaunchError: ")


@pytest.mark.parametrize("index", [-1, "0", 1.0, True, None])
def test_set_local_rank_takes_an_index(index: Any) -> None:
    with pytest.raises(ConfigError, match="a local rank is an integer of at least 0, got"):
        idist.set_local_rank(index)
    assert idist.get_local_rank() == 0


# initialize and finalize


def test_finalize_where_nothing_was_initialised() -> None:
    idist.finalize()
    idist.finalize()
    assert everything() == ALONE


def test_backend_none_is_one_process() -> None:
    idist.initialize(None)
    assert everything() == ALONE
    idist.finalize()


def test_backend_none_is_refused_where_several_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun(1, "aab", 1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="started 3 processes: each would train a model of its own"):
        idist.initialize(None)


@pytest.mark.parametrize("arguments", [{"rank": 1, "world_size": 2}, {"timeuot": 3}, {"rank": 0}, {"timeout": -1}])
def test_backend_none_checks_its_arguments_too(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        idist.initialize(None, **arguments)


@contextmanager
def one_rank(backend: str = "gloo", **arguments: Any) -> Iterator[None]:
    idist.initialize(backend, rank=0, world_size=1, **arguments)
    try:
        yield
    finally:
        idist.finalize()


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", "auto"])
def test_a_world_of_one_is_a_context_too(backend: str) -> None:
    environ = dict(os.environ)
    with one_rank(backend):
        assert everything() == expected("gloo" if backend == "auto" else backend, 0, 1, (0, 1, 1, 0))
        assert idist.all_reduce(torch.ones(2)).tolist() == [1, 1]
        assert dict(os.environ) == {"GLOO_SOCKET_IFNAME": "lo", **environ}
    assert everything() == ALONE
    assert not dist.is_initialized()
    assert dict(os.environ) == environ


def test_initialize_twice() -> None:
    with one_rank():
        with pytest.raises(ConfigError, match=r"a gloo context with 1 ranks exists already; idist\.finalize\(\) ends"):
            idist.initialize("gloo", rank=0, world_size=1)
        assert idist.backend() == "gloo"
        assert idist.all_reduce(1) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timeuot": 3}, UnknownArgument, "does not know the option 'timeuot'. Did you mean 'timeout'?"),
        ({"timeuot": 3}, TypeError, "timeuot"),
        ({"timeout": 0}, ConfigError, "timeout must be more than 0 seconds, got 0"),
        ({"timeout": "3"}, ConfigError, "timeout must be a number of seconds or a timedelta, got '3'"),
        ({"timeout": float("nan")}, ConfigError, "timeout must be"),
        ({"timeout": float("inf")}, ConfigError, "timeout must be"),
        ({"rank": 1}, ConfigError, "rank must be between 0 and world_size - 1, got rank=1, world_size=1"),
        ({"rank": "0"}, ConfigError, "rank must be an integer, got '0'"),
        ({"rank": None}, ConfigError, "rank and world_size belong together"),
        ({"device": "cpux"}, ConfigError, "device 'cpux' is not a torch device"),
        ({"device": 1.5}, ConfigError, "device 1.5 is not a torch device"),
        ({"device": "cuda"}, ConfigError, "device 'cuda' cannot be used with backend 'gloo'; here it serves: cpu"),
        ({"device": "meta"}, ConfigError, "device 'meta' cannot be used with backend 'gloo'"),
        ({"init_method": "ftp://host"}, ConfigError, "init_method 'ftp://host' is unknown"),
        ({"init_method": "tcp://host"}, ConfigError, "is not tcp://host:port"),
        ({"init_method": "tcp://host:port"}, ConfigError, "is not tcp://host:port"),
        ({"init_method": "file://"}, ConfigError, "has no path"),
        ({"backend": 1}, ConfigError, "backend must be a string or None, got 1"),
    ],
)
def test_what_fails_leaves_nothing_and_the_next_works(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """KNOWN-FAILURES 22: unknown arguments raise; a failed initialize leaks nothing."""
    environ = dict(os.environ)
    with pytest.raises(error) as caught:
        idist.initialize(**{"backend": "gloo", "rank": 0, "world_size": 1, **arguments})
    assert message in str(caught.value)
    assert everything() == ALONE
    assert not dist.is_initialized()
    assert dict(os.environ) == environ
    with one_rank():
        assert idist.backend() == "gloo"


def _fails_then_works(rank: int) -> dict[str, Any]:
    environ = dict(os.environ)
    device = "cuda" if rank == 1 else None
    seen: dict[str, Any] = {"first": outcome(lambda: idist.initialize("gloo", timeout=SECONDS, device=device))}
    seen["then"] = everything()
    seen["environ"] = dict(os.environ) == environ
    idist.initialize("gloo", timeout=SECONDS)
    seen["second"], seen["sum"] = everything(), idist.all_reduce(rank)
    idist.finalize()
    seen["after"], seen["environ"] = everything(), seen["environ"] and dict(os.environ) == environ
    return seen


def test_a_failure_on_one_rank_is_one_on_all_and_the_next_works() -> None:
    """KNOWN-FAILURES 22: what the user set stays."""
    port = free_port()
    results = run_ranks(_fails_then_works, 3, env=lambda rank: torchrun(rank, "aab", port))
    for rank, seen in enumerate(results):
        assert "device 'cuda' cannot be used with backend 'gloo'" in seen["first"]
        assert seen["first"].startswith("ConfigError: " if rank == 1 else "LaunchError: rank 1 on ")
        assert seen["then"] == seen["after"] == ALONE
        assert seen["second"]["get_rank"] == rank
        assert seen["sum"] == 3
        assert seen["environ"]


def _again_and_again(rank: int, times: int) -> list[tuple[int, int, int]]:
    seen = []
    for _ in range(times):
        idist.initialize("gloo", timeout=SECONDS)
        total = idist.all_reduce(rank + 1) + int(idist.all_reduce(torch.ones(1), group=[0, 1]))
        idist.finalize()
        seen.append((total, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return seen


@pytest.mark.parametrize("served", [False, True])
def test_again_after_finalize(served: bool) -> None:
    """At one and the same address, with the store of rank 0 and with that of an agent that outlives the context."""
    port, times = free_port(), 20
    store = dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False) if served else None
    results = run_ranks(
        _again_and_again,
        2,
        times,
        env=lambda rank: {**torchrun(rank, "aa", port), "TORCHELASTIC_USE_AGENT_STORE": served},
    )
    del store
    for seen in results:
        assert [total for total, _, _ in seen] == [5] * times
        files, threads = [files for _, files, _ in seen], [threads for _, _, threads in seen]
        # What gloo keeps for good it has from the first contexts on.
        assert max(files[-3:]) <= max(files[:3]), files
        assert max(threads[-3:]) <= max(threads[:3]), threads


def _with_models_that_stay(rank: int, times: int) -> list[bool]:
    seen, errors = [], []
    for _ in range(times):
        with pytest.raises(ConfigError) as caught:
            idist.initialize("gloo", timeout=SECONDS, device="meta")
        errors.append(caught.value)  # as a notebook does, with all its frames
        idist.initialize("gloo", timeout=SECONDS)
        model = idist.auto_model(torch.nn.Linear(2, 1))
        model(torch.ones(1, 2)).sum().backward()
        idist.finalize()
        seen.append(model.training)
        # Only now does the model of the context before go, or this one: some have outlived their context, all are used
        # until just before.
        if rank == 0:
            del model
    return seen


def test_what_outlives_its_context_hinders_no_other() -> None:
    """Neither a model nor an error holds the port; a model that goes after its context does not hang."""
    port, times = free_port(), 3
    results = run_ranks(_with_models_that_stay, 2, times, env=lambda rank: torchrun(rank, "aa", port), timeout=50)
    assert results == [[True] * times] * 2


ENDS_RIGHT_AFTER_ITS_LAST_COLLECTIVE = """
import atexit, os, threading
import torch.distributed as dist

import idist

def give_back() -> None:
    over.wait()
    os.write(1, b"given back")

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
held = dist.group.WORLD
assert idist.get_world_size() == 1 and idist.backend() == "gloo"
over = threading.Event()
threading.Thread(target=give_back, daemon=True).start()
dist.destroy_process_group()
atexit.register(over.set)
"""


def test_a_thread_that_asks_for_pythons_lock_at_the_end_gets_it() -> None:
    """As gloo's do, which abort the process else; the thread here stands for them."""
    run = [sys.executable, "-c", ENDS_RIGHT_AFTER_ITS_LAST_COLLECTIVE]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "given back"), ended.stderr


# Verification


@pytest.mark.parametrize(
    ("variable", "argument", "verifies"),
    [
        ("1", None, True),
        ("0", None, False),
        ("", None, False),
        (None, None, False),
        ("0", True, True),
        ("1", False, False),
    ],
)
def test_verify(variable: str | None, argument: bool | None, verifies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IDIST_VERIFY")
    if variable is not None:
        monkeypatch.setenv("IDIST_VERIFY", variable)
    with one_rank(verify=argument):
        assert runtime.current().verify is verifies


# Backends


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigError) as caught:
        idist.initialize("ncl")
    reason = backends.create("gloo") and C10d("nccl").unavailable_reason()
    assert reason is not None
    available = ", ".join(idist.available_backends())
    assert str(caught.value) == (
        f"backend 'ncl' is unknown; available here: {available}. Did you mean 'nccl' (not usable: {reason[0]})?"
    )
    with pytest.raises(ConfigError, match=r"'glo' is unknown; .*\. Did you mean 'gloo'\?$"):
        idist.initialize("cpu:glo")
    with pytest.raises(ConfigError, match=r"backend 'xyzzy' is unknown; available here: [a-z, ]+\.$"):
        idist.initialize("xyzzy")


@pytest.mark.parametrize(
    "name",
    [
        "gloo,nccl",
        "cpu:gloo,cpu:gloo",
        "cpu:gloo,",
        "cpu:",
        ":gloo",
        "",
        "cpu:gloo,nccl",
        "gloo:cpu",
        "cpu:nccl",
        "xyz:gloo",
        "serial",
    ],
)
def test_what_is_no_composite(name: str) -> None:
    with pytest.raises(ConfigError):
        idist.initialize(name, rank=0, world_size=1)
    assert not dist.is_initialized()


@pytest.mark.skipif(dist.is_nccl_available(), reason="for builds of torch without nccl")
@pytest.mark.parametrize("name", ["nccl", "cpu:gloo,cuda:nccl"])
def test_a_backend_that_this_torch_is_built_without(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"is built without it\. Install a CUDA build of torch") as caught:
        idist.initialize(name, rank=0, world_size=1)
    assert str(caught.value).startswith(f"backend {name!r} cannot be used here: this torch ({torch.__version__})")
    assert isinstance(caught.value, ValueError)


class Accelerators:
    """As many accelerators as a test wants the machine to have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.chosen: list[int] = []
        monkeypatch.setattr(torch.accelerator, "current_accelerator", self._current)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", self.chosen.append)

    def _current(self, check_available: bool = False) -> torch.device | None:
        return torch.device("cuda") if self.count else None


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> Accelerators:
    return Accelerators(monkeypatch)


def device_of(local_rank: int, nproc_per_node: int = 2, device: str | None = None, name: str = "gloo") -> str:
    topology = Topology("test", local_rank, nproc_per_node, local_rank, nproc_per_node, 0, 1)
    return str(C10d(name)._bind(topology, None if device is None else torch.device(device)))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_gloo_means_cpu_unless_a_device_is_asked_for(count: int, accelerators: Accelerators) -> None:
    """KNOWN-FAILURES 24."""
    accelerators.count = count
    with one_rank("gloo"):
        assert idist.device() == torch.device("cpu")
    assert [device_of(0), device_of(1), device_of(1, device="cpu")] == ["cpu", "cpu", "cpu"]
    assert accelerators.chosen == []


def test_a_device_that_is_asked_for(accelerators: Accelerators) -> None:
    """KNOWN-FAILURES 24: two ranks share one device if they ask for it."""
    accelerators.count = 1
    assert [device_of(0, device="cuda"), device_of(1, device="cuda")] == ["cuda:0", "cuda:0"]
    accelerators.count = 2
    assert [device_of(0, device="cuda"), device_of(1, device="cuda")] == ["cuda:0", "cuda:1"]
    assert device_of(0, device="cuda:1") == "cuda:1"
    assert accelerators.chosen == [0, 0, 0, 1, 1]
    with pytest.raises(ConfigError, match="device 'cuda:2' does not exist: 2 visible"):
        device_of(0, device="cuda:2")
    with pytest.raises(ConfigError, match="device 'xpu' cannot be used with backend 'gloo'; here it serves: cpu, cuda"):
        device_of(0, device="xpu")
    with pytest.raises(ConfigError, match="local rank 2 has no device: 3 processes on this node, 2 cuda devices"):
        device_of(2, 3, device="cuda")


@pytest.mark.parametrize("name", ["nccl", "cpu:gloo,cuda:nccl"])
def test_nccl_binds_by_what_is_visible(name: str, accelerators: Accelerators) -> None:
    """One visible device is this process's own, as Slurm and Kubernetes bind; of several, the local rank's."""
    accelerators.count = 1
    assert [device_of(rank, 2, name=name) for rank in range(2)] == ["cuda:0", "cuda:0"]
    accelerators.count = 2
    assert [device_of(rank, 2, name=name) for rank in range(2)] == ["cuda:0", "cuda:1"]
    if name == "nccl":
        with pytest.raises(ConfigError, match="device 'cpu' cannot be used with backend 'nccl'; here it serves: cuda"):
            device_of(0, device="cpu", name=name)
    with pytest.raises(ConfigError, match="Start at most 2 processes per node, or pass a device"):
        device_of(2, 3, name=name)


PLUGIN = """
from idist.backends.serial import Serial


class Acme(Serial):
    model_name = "acme-dist"

    @classmethod
    def names(cls):
        return ("acme",)

    def start(self, topology, *, timeout, device, colour="red", **options):
        self._reject(options)
        self.colour = colour
        return topology
"""


def _with_a_plugin(rank: int, folder: str) -> dict[str, Any]:
    sys.path.insert(0, folder)
    seen: dict[str, Any] = {"available": idist.available_backends()}
    idist.initialize("acme", rank=0, world_size=1, colour="blue")
    seen["within"] = (idist.backend(), idist.model_name(), getattr(runtime.current().backend, "colour", None))
    idist.finalize()
    seen["unknown option"] = outcome(lambda: idist.initialize("acme", rank=0, world_size=1, color="blue"))
    seen["close"] = outcome(lambda: idist.initialize("acm"))
    with one_rank("gloo"):
        seen["gloo"] = idist.backend()
    return seen


def add_plugin(folder: Path, module: str, source: str, target: str) -> None:
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[idist.backends]\n{module} = {module}:{target}\n")


def test_a_backend_of_another_package(tmp_path: Path) -> None:
    add_plugin(tmp_path, "acme_comm", PLUGIN, "Acme")
    (seen,) = run_ranks(_with_a_plugin, 1, str(tmp_path))
    assert {"gloo", "acme"} <= set(seen["available"])
    assert seen["within"] == ("acme", "acme-dist", "blue")
    assert "backend 'acme' does not know the option 'color'. Did you mean 'colour'?" in seen["unknown option"]
    assert seen["close"].endswith("Did you mean 'acme'?")
    assert seen["gloo"] == "gloo"


def _with_a_broken_plugin(rank: int, folder: str) -> dict[str, Any]:
    sys.path.insert(0, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with one_rank("gloo"):
            backend = idist.backend()
    return {"backend": backend, "warnings": [str(warning.message) for warning in caught]}


def test_a_package_with_a_broken_backend_breaks_no_other(tmp_path: Path) -> None:
    add_plugin(tmp_path, "broken_comm", "import a_module_that_nobody_has\n", "Broken")
    (seen,) = run_ranks(_with_a_broken_plugin, 1, str(tmp_path))
    assert seen["backend"] == "gloo"
    (warning,) = seen["warnings"]
    assert "broken_comm" in warning
    assert "a_module_that_nobody_has" in warning


def _acme_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _with_a_third_partys_backend(rank: int) -> dict[str, Any]:
    dist.Backend.register_backend("acme", _acme_group, devices=["cpu"])
    seen: dict[str, Any] = {"available": idist.available_backends()}
    for name in ("acme", "cpu:acme"):
        idist.initialize(name, timeout=SECONDS)
        seen[name] = (idist.backend(), str(idist.device()), idist.all_reduce(torch.tensor([rank, 1])).tolist())
        seen["value"], seen["trains"] = idist.all_gather(str(rank)), gradients_are_averaged(rank)
        idist.finalize()
    dist.init_process_group("acme", timeout=TIMEOUT)
    seen["by hand"], seen["sum"] = everything(), idist.all_reduce(rank + 1)
    dist.destroy_process_group()
    return seen


def test_a_backend_that_somebody_registered_with_torch() -> None:
    port = free_port()
    for rank, seen in enumerate(
        run_ranks(_with_a_third_partys_backend, 2, env=lambda rank: torchrun(rank, "aa", port))
    ):
        assert "acme" in seen["available"]
        assert seen["acme"] == ("acme", "cpu", [1, 2])
        assert seen["cpu:acme"] == ("cpu:acme", "cpu", [1, 2])
        assert seen["value"] == ["0", "1"]
        assert seen["trains"]
        assert seen["by hand"] == expected("acme", rank, 2, (rank, 2, 1, 0))
        assert seen["sum"] == 3
