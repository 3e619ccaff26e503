"""The sections of the report of ``idist check``: facts, as data and as lines, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
import platform
import socket
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

import idist
from idist import backends, environments, rendezvous
from idist.backends.base import accelerator as accelerator_here
from idist.cli import network
from idist.environments import Detection
from idist.errors import BackendUnavailable, LaunchError
from idist.topology import Topology

_GIB = 2**30
_ANY_PORT = 29500

# Which of the dozens that srun sets tell where a task stands.
_SLURM = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS"),
    *("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_NODES"),
    *("SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "SLURMD_NODENAME", "SLURM_DISTRIBUTION", "SLURM_HOSTFILE"),
    *("SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "SLURM_HET_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_GPUS"),
)
_STEERING = (
    *("GLOO_", "NCCL_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "TP_SOCKET_", "UCX_", "UCC_", "FI_"),
    *("IDIST_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES"),
    *("ROCR_VISIBLE_DEVICES", "PYTORCH_"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """A part of the report.

    Attributes:
        data: for ``--json``.
        rows: a label and a text each, for people.
        problems: what has to be repaired.
        hints: what may be a slip.
    """

    title: str
    data: Any
    rows: list[tuple[str, str]]
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


def software() -> Section:
    """The versions that a bug report needs."""
    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    compiled = [f"{name} {version}" for name, version in built.items() if version]
    data = {
        "idist": idist.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "platform": platform.platform(),
    }
    rows = [
        ("idist", idist.__version__),
        ("python", f"{data['python']}, {sys.executable}"),
        ("torch", f"{data['torch']}, built {f'for {compiled[0]}' if compiled else 'without CUDA'}"),
        ("system", platform.platform()),
    ]
    return Section("software", data, rows)


def devices() -> Section:
    """What this process can train on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    data: dict[str, Any] = {"cpu": {"usable": cores, "present": os.cpu_count(), "threads": threads}}
    rows = [("cpu", f"{cores} of {os.cpu_count()} CPUs usable; threads of torch: {threads}")]
    accelerator = accelerator_here()
    found = [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())] if accelerator else []
    for device in found:
        data[str(device)] = _properties(device)
        rows.append((str(device), ", ".join(data[str(device)].values())))
    if accelerator is None and torch.version.cuda:
        data["no_cuda_because"] = _why_no_cuda()
        rows.append(("cuda", f"none, though torch is built for it: {data['no_cuda_because']}"))
    return Section("devices", data, rows)


def usable_backends(asked: str | None) -> Section:
    """Each backend, usable or why not and what to do. A problem if it is the one that was asked for.

    Raises:
        ConfigError: no backend has this name.
    """
    with warnings.catch_warnings(record=True) as left_out:  # those of other packages that cannot be imported
        warnings.simplefilter("always")
        classes = [cls for cls in backends.classes() if cls.model_name != "serial"]
    # Of one name the first class counts, as for whoever asks for it; the last wins in a dict.
    by_name = {name: cls for cls in reversed(classes) for name in reversed(cls.names())}
    found = {name: by_name[name](name).unavailable_reason() for name in reversed(by_name)}
    data = {name: {"usable": True} if why is None else _unusable(*why) for name, why in found.items()}
    rows = [(name, "usable" if why is None else f"no: {why[0]}. {why[1]}") for name, why in found.items()]
    data["auto"] = {"usable": True, "is": backends.create(backends.AUTO).name}
    rows.append(("auto", f"is {data['auto']['is']} here"))
    problems = []
    try:
        backends.create(asked or backends.AUTO)
    except BackendUnavailable as error:
        problems.append(str(error))
    return Section("backends", data, rows, tuple(problems), tuple(str(warning.message) for warning in left_out))


def environment(env: Mapping[str, str]) -> tuple[Section, Detection | None]:
    """Who started this process, and why it is thought so."""
    try:
        detection = environments.detect(env)
    except LaunchError as error:
        return Section("environment", {"error": str(error)}, [("half set", "see below")], (str(error),)), None
    topology = detection.topology
    data = {
        "name": topology.environment,
        "evidence": list(topology.evidence),
        "rejected": {name: rejected.reason for name, rejected in detection.rejected},
    }
    first, *more = topology.evidence or ("one process; nothing says that there are more",)
    rows = [(topology.environment, first), *(("", each) for each in more)]
    rows += [(f"not {name}", rejected.reason) for name, rejected in detection.rejected]
    return Section("environment", data, rows, hints=detection.hints), detection


def place(topology: Topology) -> Section:
    """Where this process stands."""
    data = {field.name: getattr(topology, field.name) for field in dataclasses.fields(topology)}
    unplaced = {"local_rank", "nproc_per_node", "node_rank", "nnodes"} if not topology.placed else set()
    data = {name: None if name in unplaced else value for name, value in data.items() if name != "evidence"}
    nodes = "the variables do not tell; the ranks will exchange their hosts"
    if topology.placed:
        local, node = f"local rank {topology.local_rank}", f"node {topology.node_rank}"
        nodes = f"{local} of {topology.nproc_per_node} on {node} of {topology.nnodes}"
    port = topology.master_port or "agreed by the ranks"
    rows = [("rank", f"{topology.rank} of {topology.world_size}"), ("node", nodes)]
    if topology.world_size > 1:
        rows.append(("master", f"{topology.master_addr or ' or '.join(topology.hosts) or 'not known'}, port {port}"))
    return Section("topology", data, rows)


def slurm(env: Mapping[str, str], shown: Iterable[str]) -> Section | None:
    """What Slurm says, if it says anything: all of it as data, what places a task and is not yet ``shown`` as lines."""
    data = {name: value for name, value in sorted(env.items()) if name.startswith("SLURM")}
    rows = [(name, data[name]) for name in _SLURM if name in data and f"{name}={data[name]}" not in shown]
    return Section("slurm", data, rows) if data else None


def interfaces(env: Mapping[str, str], nnodes: int) -> Section:
    """The network of this machine, and how its own name looks to it."""
    present = network.interfaces()
    states = {True: "up", False: "down", None: "?"}
    rows = [(each.name, f"{states[each.up]:5}{' '.join(each.addresses) or 'no address'}") for each in present]
    host = socket.gethostname()
    own = network.resolve(host)
    rows.append(("host name", f"{host}, which is {' '.join(own) or 'not known to any resolver'}"))
    data = {
        "interfaces": [dataclasses.asdict(each) for each in present],
        "hostname": host,
        "hostname_addresses": list(own),
    }
    missing = network.missing_interfaces(env, present)
    names = ", ".join(each.name for each in present)
    problems = tuple(f"{variable} names no interface of {host}, which has {names}" for variable in missing)
    hints = []
    chosen = any(name.endswith("_SOCKET_IFNAME") for name in env)
    if nnodes > 1 and not chosen and all(network.is_loopback(address) for address in own):
        hints.append(
            f"the name {host} resolves to {' '.join(own) or 'nothing'}, which other nodes cannot reach. If the ranks "
            "cannot connect, export GLOO_SOCKET_IFNAME with the interface that the nodes share"
        )
    return Section("network", data, rows, problems, tuple(hints))


def master(topology: Topology) -> Section | None:
    """Whether the meeting point can be reached from here, if the environment names one."""
    if topology.master_addr is None or topology.world_size == 1:
        return None
    token = topology.job_token
    port = topology.master_port or (rendezvous.candidate_ports(token)[0] if token else _ANY_PORT)
    reach = network.reach(topology.master_addr, port)
    data = dataclasses.asdict(reach) | {"host": topology.master_addr, "port": port}
    answer = "a store listens" if reach.listens else "the host answers, nobody listens yet: rank 0 will"
    text = f"{' '.join(reach.addresses) or 'no address'}; port {port}: {reach.problem or answer}"
    problems = (f"the master cannot be reached: {reach.problem}",) if reach.problem else ()
    return Section("master", data, [(topology.master_addr, text)], problems)


def variables(env: Mapping[str, str], shown: Iterable[str]) -> Section | None:
    """Those that steer libraries, which nobody remembers to have set; as lines those not yet ``shown``."""
    data = {name: value for name, value in sorted(env.items()) if name.startswith(_STEERING)}
    rows = [(name, value) for name, value in data.items() if f"{name}={value}" not in shown]
    return Section("variables", data, rows) if data else None


def _unusable(why: str, fix: str) -> dict[str, Any]:
    return {"usable": False, "why": why, "fix": fix}


def _properties(device: torch.device) -> dict[str, str]:
    properties = torch.get_device_module(device).get_device_properties(device)
    data = {"name": str(getattr(properties, "name", device.type))}
    if memory := getattr(properties, "total_memory", None):
        data["memory"] = f"{memory / _GIB:.1f} GiB"
    return data


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r} leaves {torch.cuda.device_count()}"
