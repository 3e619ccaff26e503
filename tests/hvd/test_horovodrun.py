"""horovodrun as a launcher, for Horovod and for another backend; Horovod that the user's script has started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import idist
from hvd import horovodrun

pytestmark = pytest.mark.horovod

PLACE = """
    def place():
        return dict(
            rank=idist.get_rank(), world=idist.get_world_size(), local=idist.get_local_rank(),
            nproc=idist.get_nproc_per_node(), node=idist.get_node_rank(), nnodes=idist.get_nnodes(),
        )
"""


def expected(rank: int, local: int, nproc: int, node: int, nnodes: int, world: int) -> dict[str, int]:
    return {"rank": rank, "world": world, "local": local, "nproc": nproc, "node": node, "nnodes": nnodes}


@pytest.mark.parametrize("backend", ["horovod", "gloo"])
def test_one_node(tmp_path: Path, backend: str) -> None:
    script = f"""{PLACE}
    idist.initialize({backend!r}, timeout=60)
    said = [idist.runtime.current().topology.environment, place(), idist.all_gather(idist.get_rank()), idist.backend()]
    """
    ranks = horovodrun.said(script, 2, tmp_path)
    assert ranks == [["horovod", expected(rank, rank, 2, 0, 1, 2), [0, 1], backend] for rank in range(2)]


@pytest.mark.parametrize("backend", ["horovod", "gloo"])
@pytest.mark.parametrize(("hosts", "nodes"), [("localhost:1,127.0.0.1:1", [1, 1]), ("localhost:2,127.0.0.1:1", [2, 1])])
def test_two_nodes(tmp_path: Path, hosts: str, nodes: list[int], backend: str) -> None:
    """Two names of one machine are two nodes for horovodrun, and so for us. The second job has unequal ones."""
    script = f"""{PLACE}
    idist.initialize({backend!r}, timeout=60)
    first = place()
    with idist.one_rank_first(local=True):
        pass
    pair = [0, idist.get_world_size() - 1]
    gathered = idist.all_gather(idist.get_rank(), group=pair) if first["rank"] in pair else 0
    said = [first, idist.all_reduce(1.5), gathered]
    if idist.backend() == "horovod":
        import horovod.torch as hvd
        assert (hvd.rank(), hvd.size()) == (first["rank"], first["world"])
        assert (hvd.local_rank(), hvd.local_size()) == (first["local"], first["nproc"])
        assert (hvd.cross_rank(), hvd.cross_size()) == ((first["node"], 2) if first["local"] == 0 else (0, 1))
    idist.barrier()
    """
    world = sum(nodes)
    places = [(local, count, node) for node, count in enumerate(nodes) for local in range(count)]
    ranks = horovodrun.said(script, world, tmp_path, hosts=hosts)
    for rank, (local, count, node) in enumerate(places):
        place, total, pair = ranks[rank]
        assert place == expected(rank, local, count, node, 2, world)
        assert total == 1.5 * world
        assert pair == ([0, world - 1] if rank in (0, world - 1) else 0)


def test_end_and_begin_again(tmp_path: Path) -> None:
    """With variables as they were, and Horovod ended in between."""
    script = """
    import horovod.torch as hvd
    before, said = dict(os.environ), []
    for _ in range(3):
        idist.initialize("horovod", timeout=60)
        said.append([idist.all_reduce(1), hvd.size()])
        idist.finalize()
        assert not hvd.is_initialized()
        assert dict(os.environ) == before
        assert (idist.backend(), idist.get_world_size()) == (None, 1)
    """
    assert horovodrun.said(script, 2, tmp_path) == [[[2, 2]] * 3] * 2


@pytest.mark.parametrize("hosts", [None, "localhost:1,127.0.0.1:1"])
def test_horovod_that_the_script_has_started(tmp_path: Path, hosts: str | None) -> None:
    script = f"""{PLACE}
    assert idist.backend() is None
    import horovod.torch as hvd
    assert idist.backend() is None
    hvd.init(process_sets="dynamic")
    said = [idist.backend(), idist.model_name(), idist.get_rank(), idist.get_world_size()]
    idist.sync()
    said += [place(), idist.all_gather("x" * hvd.rank()), idist.all_reduce(1, group=[0])  if hvd.rank() == 9 else 0]
    group = idist.new_group([1])
    said += [idist.all_reduce(5, group=[1]) if hvd.rank() == 1 else 0, idist.all_reduce(1)]
    idist.finalize()
    assert hvd.is_initialized(), "it is the user's"
    with idist.Parallel("horovod") as parallel:
        said += parallel.run(lambda local_rank: idist.all_reduce(2))
    assert hvd.is_initialized()
    hvd.shutdown()
    said += [idist.backend()]
    """
    for rank, said in enumerate(horovodrun.said(script, 2, tmp_path, hosts=hosts)):
        place = expected(rank, rank, 2, 0, 1, 2) if hosts is None else expected(rank, 0, 1, rank, 2, 2)
        assert said == ["horovod", "horovod-dist", rank, 2, place, ["", "x"], 0, 5 * rank, 2, 4, None]


def test_process_sets_of_the_script(tmp_path: Path) -> None:
    """Those that it has given to hvd.init() are used; more cannot be had, and that is said."""
    script = """
    import horovod.torch as hvd
    mine = hvd.ProcessSet([0])
    hvd.init(process_sets=[mine])
    said = [idist.all_reduce(1, group=[0]) if hvd.rank() == 0 else idist.new_group([0]), idist.all_reduce(1)]
    try:
        idist.new_group([1])
    except idist.ConfigError as error:
        said.append("process_sets" in str(error))
    """
    assert [said[1:] for said in horovodrun.said(script, 2, tmp_path)] == [[2, True]] * 2


def test_a_group_that_not_all_ranks_make_is_no_hang(tmp_path: Path) -> None:
    """Where the script has started Horovod, making a group needs all ranks."""
    script = """
    import time
    import horovod.torch as hvd
    hvd.init(process_sets="dynamic")
    idist.runtime.current().backend._sets._timeout /= 600
    if hvd.rank() == 1:
        try:
            idist.new_group([1])
        except idist.PeerFailed as error:
            print(error, flush=True)
        open(f"{os.path.dirname(__file__)}/done", "w").close()
    while not os.path.exists(f"{os.path.dirname(__file__)}/done"):
        time.sleep(0.1)
    os._exit(0)  # Horovod cannot end well any more
    """
    assert "all ranks have to call idist.new_group()" in horovodrun.run(script, 2, tmp_path).stdout


def test_processes_are_not_started_twice(tmp_path: Path) -> None:
    """KNOWN-FAILURES 18, with horovodrun as the launcher."""
    script = """
    with idist.Parallel(backend="horovod", nproc_per_node=2) as parallel:
        parallel.run(print)
    """
    ended = horovodrun.run(script, 2, tmp_path)
    assert ended.returncode != 0
    assert "horovod has started 2 already" in ended.stderr


@pytest.mark.parametrize("fold", [2, 4])
def test_idist_run(tmp_path: Path, fold: int) -> None:
    path = tmp_path / "script.py"
    path.write_text("import idist\nidist.initialize('horovod', timeout=60)\nprint('sum', idist.all_reduce(1))\n")
    ended = subprocess.run(
        [sys.executable, "-m", "idist", "run", "--horovod", "--nproc", str(fold), str(path)],
        env=horovodrun.environment(),
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"sum {fold}") == fold


@pytest.mark.parametrize("launcher", ["torchrun", "spawn"])
def test_other_launchers_start_it(tmp_path: Path, launcher: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import idist\n\ndef main(local_rank):\n    return idist.backend(), idist.all_reduce(local_rank + 1)\n\n"
        "if __name__ == '__main__':\n"
        f"    with idist.Parallel('horovod', nproc_per_node={'2' if launcher == 'spawn' else None}, timeout=60) as p:\n"
        "        print(p.run(main), flush=True)\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if launcher == "torchrun" else []
    ended = subprocess.run(
        [sys.executable, *words, str(path)],
        env=horovodrun.environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("('horovod', 3)") == 2
    assert "Traceback" not in ended.stderr


def test_getters_cost_nothing_much() -> None:
    """Also where Horovod is installed, and another library is in use."""
    assert "horovod.torch" not in sys.modules
    calls = 20_000
    begun = time.perf_counter()
    for _ in range(calls):
        idist.get_rank()
    assert (time.perf_counter() - begun) / calls < 2e-6
    assert "horovod" not in sys.modules


def test_installing_it_changes_nothing_for_others(tmp_path: Path) -> None:
    """KNOWN-FAILURES 23 was about another library whose mere installation broke serial runs."""
    script = (
        "import os, sys\nbefore = dict(os.environ)\nimport torch, idist\n"
        "def main(local_rank):\n"
        "    model = idist.auto_model(torch.nn.Linear(2, 2))\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    assert idist.auto_optim(optimizer) is optimizer and type(optimizer) is torch.optim.SGD\n"
        "    assert not [name for name in sys.modules if name.startswith('horovod')]\n"
        "    return idist.backend(), str(idist.device()), type(model).__name__\n"
        "if __name__ == '__main__':\n"
        "    changed = {name for name, _ in before.items() ^ os.environ.items()} - {'TORCHINDUCTOR_CACHE_DIR'}\n"
        "    print(main(0), idist.has_hvd_support, idist.model_name(), changed)\n"
        "    print(idist.spawn('gloo', main, nproc_per_node=2))\n"
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    ended = subprocess.run(
        [sys.executable, str(path)], env=os.environ, capture_output=True, text=True, timeout=90, check=True
    )
    assert ended.stderr == ""
    ddp = "('gloo', 'cpu', 'DistributedDataParallel')"
    assert ended.stdout.splitlines() == ["(None, 'cpu', 'Linear') True serial set()", f"[{ddp}, {ddp}]"]


def test_without_numpy_it_says_so_at_once(tmp_path: Path) -> None:
    """Horovod's objects fail without it, and its optimizer hangs."""
    script = """
    class Without:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "numpy":
                raise ModuleNotFoundError(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "numpy"]:
        del sys.modules[name]
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "numpy" else real(name, package)
    idist.initialize("horovod", timeout=60)
    """
    ended = horovodrun.run(script, 2, tmp_path)
    assert ended.returncode != 0
    assert "BackendUnavailable" in ended.stderr
    assert "pip install numpy" in ended.stderr
