"""The processes of a run, and what they tell each other.

Every method of `Processes` but `joined` and `mine` is collective: all processes call it, in the same order. What is
said goes over the CPU (gloo), also beside GPUs: no question of this kind makes a process wait for its device.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import one_line
from . import interruption
from .cpus import allowed, cpus
from .meeting import Meeting, lost_peers


def join(meeting: Meeting, index: int, count: int) -> Processes:
    """Become a group with the others that meet there; from now on each waits for another for the meeting's time-out.

    Raises:
        PeerError: they do not come, or only to the port of the meeting.
        InterruptedRunError: one of them was asked to stop.
    """
    backend = "cpu:gloo,cuda:nccl" if over_nccl() else "gloo"
    timeout = timedelta(seconds=meeting.timeout)
    with interruption.deferred(), lost_peers():
        meeting.all_here(count)
        meeting.in_time(  # gloo tries each port again and again
            lambda: dist.init_process_group(
                backend, store=meeting.store, rank=index, world_size=count, timeout=timeout
            ),
            f"{count} processes must reach each other at any port, not at MASTER_PORT alone,",
        )
    return Processes.joined()


def over_nccl() -> bool:
    """Whether GPUs speak to each other here, which they do over NCCL."""
    return torch.cuda.is_available()


@dataclass(frozen=True)
class Processes:
    """Process `index` of `count`; alone it answers every question itself."""

    index: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """The processes of torch's process group; one, where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def mine(self, rows: Tensor) -> Tensor:
        """This process's share of (n, …) rows: in order, larger by one at most than another's, the larger first."""
        return rows.tensor_split(self.count)[self.index]

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        if self.count == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def gather(self, rows: Tensor) -> Tensor:
        """The (n, …) rows of all processes, n its own on each, in the order of the processes; on the CPU."""
        rows = rows.cpu()
        if self.count == 1:
            return rows
        sizes = [torch.tensor(0) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor(len(rows)))
        padded = rows.new_zeros((int(max(sizes)), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def agree(self, module: nn.Module) -> None:
        """Give the module's buffers (batch norm's statistics) on all processes the values of the first."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def share(self, data: bytes) -> bytes:
        """The first process's bytes, on all."""
        if self.count == 1:
            return data
        size = torch.tensor(len(data))
        dist.broadcast(size, 0)
        if not size:
            return b""
        shared = torch.empty(int(size), dtype=torch.uint8)
        if self.index == 0:
            shared.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(shared, 0)
        return shared.numpy().tobytes()

    def cpus(self) -> int:
        """The CPUs that are this process's share, at least 1: of several on a node all may run on the same ones."""
        if self.count == 1:
            return cpus()
        here = f"{socket.gethostname()} {allowed()}"
        return max(cpus() // self.gather_texts(here).count(here), 1)

    def gather_texts(self, text: str) -> list[str]:
        """What each process says, a line each, in their order."""
        if self.count == 1:
            return [text]
        line = f"{one_line(text)}\n".encode()
        return bytes(self.gather(torch.frombuffer(bytearray(line), dtype=torch.uint8)).tolist()).decode().splitlines()
