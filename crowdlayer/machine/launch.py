"""Where am I: alone, on one of N nodes, one process of N, one of an array of runs. Read from what the platform sets.

The platforms in the order in which they are asked, and what is theirs:

    torchrun     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: it has started the processes itself
    explicit     NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
    kubernetes   NNODES with JOB_COMPLETION_INDEX (an Indexed Job says not how many pods it has); the address of pod 0
                 is made from this pod's host name, which a headless Service and `subdomain` give a domain
    aws-batch    AWS_BATCH_JOB_NUM_NODES …; the main node is not told its own address
    slurm        a step's variables: one task per node, or one per GPU, which are the processes then
    explicit     RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT without LOCAL_RANK: Kubeflow's PyTorchJob and Volcano start
                 one process in each pod
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import SettingsError
from .network import interface_towards

PORT = 29500
"""Of the first node, where nobody says otherwise; torch's own default."""
INTERACTIVE = "4294967290"
"""What Slurm calls the step that is the shell of an `salloc`, where `use_interactive_step` is on: no step of srun."""
OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes there are, as MPI's launchers say it; so does srun, where Slurm's MpiDefault is pmi2."""

Platform = Literal["alone", "explicit", "torchrun", "kubernetes", "aws-batch", "slurm"]


@dataclass(frozen=True)
class Peers:
    """This process as the platform has started it: one of `world`, one of `local_world` on its node."""

    rank: int
    world: int
    local_rank: int
    local_world: int


@dataclass(frozen=True)
class Launch:
    """What was recognised. `peers` is there where the platform itself has started a process per GPU."""

    platform: Platform = "alone"
    n_nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int | None = None
    """Of the first node; None: any that is free, there is one node."""
    peers: Peers | None = None
    attempt: int = 0
    """Of a launcher that starts the processes again, and keeps the store at which they meet."""
    run: str = ""
    """What the launcher calls the run: another may be on the same machines."""

    def __str__(self) -> str:
        where = f"node {self.node} of {self.n_nodes}" if self.n_nodes > 1 else "one node"
        process = "" if self.peers is None else f", process {self.peers.rank} of {self.peers.world}"
        met_at = f", meeting at {self.address}:{self.port}" if self.n_nodes > 1 or self.peers is not None else ""
        return f"{self.platform}: {where}{process}{met_at}"

    @property
    def leads(self) -> bool:
        """Whether this process is its node's first: it syncs the data, alone."""
        return self.peers is None or self.peers.local_rank == 0

    @property
    def name(self) -> str:
        """What the others call this process."""
        return f"node {self.node}" if self.peers is None else f"process {self.peers.rank}"

    @property
    def attendance(self) -> int:
        """How many processes meet: one of each node, or all that the platform has started."""
        return self.n_nodes if self.peers is None else self.peers.world

    @property
    def publishes(self) -> bool:
        """Whether this process is the run's first: it puts checkpoints and results."""
        return self.node == 0 and self.leads


def recognise(variables: Mapping[str, str] = os.environ) -> Launch:
    """Where this process is.

    Raises:
        SettingsError: the variables contradict each other, or one is missing.
    """
    env = _Variables(variables)
    if env.all("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        launch = _torchrun(env)
    elif env.any("NNODES", "NODE_RANK"):
        launch = _explicit(env)
    elif env.any("AWS_BATCH_JOB_NUM_NODES"):
        launch = _aws_batch(env)
    elif env.any("SLURM_JOB_ID"):
        launch = _slurm(env)
    elif env.all("RANK", "WORLD_SIZE") and env.number("WORLD_SIZE") > 1:
        launch = _one_per_node(env)
    else:
        launch = Launch()
    try:
        launch.address.encode("idna")  # what the sockets will do with it
    except UnicodeError as error:
        raise SettingsError(f"MASTER_ADDR: must be a host's name or address, got {launch.address!r}") from error
    if not 0 <= launch.node < launch.n_nodes:
        raise SettingsError(f"{launch.platform}: node {launch.node} must be one of 0 … {launch.n_nodes - 1}")
    if launch.peers is not None and not (
        0 <= launch.peers.rank < launch.peers.world and 0 <= launch.peers.local_rank < launch.peers.local_world
    ):
        raise SettingsError(f"{launch.platform}: {launch.peers} must be one of its world")
    return launch


def announced(launch: Launch) -> dict[str, str]:
    """What tells gloo by which interface the other nodes reach this one, unless the environment does."""
    variable = "GLOO_SOCKET_IFNAME"
    if launch.n_nodes == 1 or _Variables(os.environ).any(variable):
        return {}
    name = interface_towards(launch.address)
    return {} if name is None else {variable: name}


def as_torchrun(launch: Launch, peers: Peers) -> None:
    """Tell libraries that know torchrun's variables alone."""
    os.environ |= announced(launch) | {
        "MASTER_ADDR": launch.address,
        "MASTER_PORT": str(launch.port or PORT),
        "RANK": str(peers.rank),
        "WORLD_SIZE": str(peers.world),
        "LOCAL_RANK": str(peers.local_rank),
        "LOCAL_WORLD_SIZE": str(peers.local_world),
    }


def as_alone() -> None:
    """Have Accelerate, which reads torchrun's variables and MPI's, wait for nobody: what comes next is done alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *OF_MPI):
        os.environ.pop(name, None)


def hosts_the_store(launch: Launch, variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this process has the store at which all meet: the run's first, unless torchrun's agent has one."""
    agent = _Variables(variables).text("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return launch.publishes and not (launch.platform == "torchrun" and agent)


def array_index(variables: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """This run's place in an array of runs, from 0, and the variable that says so."""
    env = _Variables(variables)
    names = ["AWS_BATCH_JOB_ARRAY_INDEX", "SLURM_ARRAY_TASK_ID"]
    if not env.any("NNODES"):  # else the index counts the nodes of one run
        names.append("JOB_COMPLETION_INDEX")
    found = {name: env.number(name) for name in names if env.any(name)}
    return next(iter(found.items()), None)


class _Variables:
    """The environment; an empty variable counts as not set."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def text(self, name: str, default: str = "") -> str:
        return self._variables.get(name, "").strip() or default

    def any(self, *names: str) -> bool:
        return any(self.text(name) for name in names)

    def all(self, *names: str) -> bool:
        return all(self.text(name) for name in names)

    def number(self, name: str, default: int | None = None) -> int:
        text = self.text(name)
        if not text and default is not None:
            return default
        if not re.fullmatch(r"\d{1,10}", text):
            raise SettingsError(f"{name}: must be a number, got {text!r}" if text else f"{name}: must be set")
        return int(text)

    def port(self, default: int = PORT) -> int:
        port = self.number("MASTER_PORT", default)
        if not 0 < port < 65536:
            raise SettingsError(f"MASTER_PORT: must be from 1 to 65535, got {port}")
        return port


def _torchrun(env: _Variables) -> Launch:
    world = env.number("WORLD_SIZE")
    local_world = env.number("LOCAL_WORLD_SIZE", 1 if world == 1 else None)
    peers = Peers(env.number("RANK"), world, env.number("LOCAL_RANK"), local_world)
    n_nodes = max(peers.world // max(peers.local_world, 1), 1)
    if env.any("NNODES") and env.number("NNODES") != n_nodes:
        raise SettingsError(
            f"NNODES: must agree with WORLD_SIZE={peers.world} and LOCAL_WORLD_SIZE={peers.local_world}, "
            f"got {env.number('NNODES')}"
        )
    node = env.number("GROUP_RANK", peers.rank // max(peers.local_world, 1))
    attempt = env.number("TORCHELASTIC_RESTART_COUNT", 0)
    run = env.text("TORCHELASTIC_RUN_ID")
    return Launch("torchrun", n_nodes, node, _master(env, peers.world), env.port(), peers, attempt, run)


def _one_per_node(env: _Variables) -> Launch:
    world = env.number("WORLD_SIZE")
    return Launch("explicit", world, env.number("RANK"), _master(env, world), env.port())


def _master(env: _Variables, world: int) -> str:
    if world > 1 and not env.any("MASTER_ADDR"):
        raise SettingsError("MASTER_ADDR: must be set beside RANK and WORLD_SIZE")
    return env.text("MASTER_ADDR", "127.0.0.1")


def _explicit(env: _Variables) -> Launch:
    """NNODES and the rest; in an Indexed Job the pod's index is the node's."""
    platform: Platform = "explicit"
    n_nodes = env.number("NNODES")
    address = env.text("MASTER_ADDR")
    if env.any("JOB_COMPLETION_INDEX"):
        platform = "kubernetes"
        node = env.number("JOB_COMPLETION_INDEX")
        if env.any("NODE_RANK") and env.number("NODE_RANK") != node:
            raise SettingsError(f"NODE_RANK: must be JOB_COMPLETION_INDEX={node}, got {env.number('NODE_RANK')}")
        address = address or _first_pod(node)
    else:
        node = env.number("NODE_RANK", 0 if n_nodes == 1 else None)
    if n_nodes > 1 and not address:
        raise SettingsError(f"MASTER_ADDR: must be set, NNODES is {n_nodes}")
    return Launch(platform, n_nodes, node, address or "127.0.0.1", env.port() if n_nodes > 1 else None)


def _first_pod(index: int) -> str:
    """The name of pod 0 of this Indexed Job, where a headless Service gives its pods a domain."""
    name, dot, domain = socket.getfqdn().partition(".")
    return f"{name.removesuffix(f'-{index}')}-0.{domain}" if dot and name.endswith(f"-{index}") else ""


def _aws_batch(env: _Variables) -> Launch:
    n_nodes, main = env.number("AWS_BATCH_JOB_NUM_NODES"), env.number("AWS_BATCH_JOB_MAIN_NODE_INDEX", 0)
    node = (env.number("AWS_BATCH_JOB_NODE_INDEX") - main) % max(n_nodes, 1)  # so that the main node is the first
    address = env.text("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS")
    if node and not address:
        raise SettingsError("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS: must be set on all nodes but the main one")
    return Launch("aws-batch", n_nodes, node, address or "127.0.0.1", env.port() if n_nodes > 1 else None)


def _slurm(env: _Variables) -> Launch:
    """A step of srun; what runs in a batch script or the shell of an allocation without srun is alone."""
    if not env.any("SLURM_STEP_NUM_TASKS") or env.text("SLURM_STEP_ID") == INTERACTIVE:
        if (n_nodes := env.number("SLURM_NNODES", 1)) > 1:
            raise SettingsError(f"SLURM_NNODES: {n_nodes} nodes need srun, which starts the job on each")
        return Launch("slurm")
    tasks, n_nodes = env.number("SLURM_STEP_NUM_TASKS"), env.number("SLURM_STEP_NUM_NODES", 1)
    node = env.number("SLURM_NODEID", 0)
    hosts = env.text("SLURM_STEP_NODELIST") or env.text("SLURM_JOB_NODELIST")
    address = env.text("MASTER_ADDR") or _first_host(hosts) or "127.0.0.1"
    job, step = env.number("SLURM_JOB_ID"), env.number("SLURM_STEP_ID", 0)
    port = env.port(20000 + (job + 1009 * step) % 20000)  # jobs may share nodes, and steps of a job run side by side
    run = f"slurm-{job}.{step}"
    if tasks == n_nodes:
        return Launch("slurm", n_nodes, node, address, port if n_nodes > 1 else None, run=run)
    per_node = _tasks_per_node(env.text("SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(per_node) or sum(per_node) != tasks or len(set(per_node)) > 1:
        raise SettingsError(
            f"SLURM_STEP_TASKS_PER_NODE: must be as many on each of {n_nodes} nodes and {tasks} in all, "
            f"got {env.text('SLURM_STEP_TASKS_PER_NODE')!r}"
        )
    peers = Peers(env.number("SLURM_PROCID"), tasks, env.number("SLURM_LOCALID"), per_node[node])
    return Launch("slurm", n_nodes, node, address, port, peers, run=run)


def _first_host(hosts: str) -> str:
    """The first of a Slurm host list: `gpu[03-07,9],x1` → `gpu03`."""
    first = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,]*))?", hosts)
    return "".join(part or "" for part in first.groups()) if first else ""


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` → [2, 2, 2, 1]."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(one[1]) for one in found if one for _ in range(int(one[2] or 1))]
