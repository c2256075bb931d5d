"""The processes of a run, and what they tell each other.

Every method of `Processes` but `mine` is collective: all processes call it, in the same order. What is said
goes over the CPU (gloo), also beside GPUs: no question of this kind makes a process wait for its device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

from ..errors import PeerError, one_line


def meet(address: str, port: int, timeout: float, host: bool = False) -> TCPStore:
    """The store at which the processes of a run meet, before they are a group.

    Args:
        port: 0 for any that is free; `store.port` tells.
        timeout: seconds to wait for it, and for what others put there.
        host: whether it is this process's.

    Raises:
        PeerError: it does not answer, or the port is not free.
    """
    with lost_peers():
        return TCPStore(address, port, is_master=host, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def join(store: Store, index: int, count: int, timeout: float) -> Processes:
    """Become a group with the others that meet at `store`.

    Args:
        timeout: seconds to wait for the others, now and whenever they shall say something.

    Raises:
        PeerError: they do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with lost_peers():
        dist.init_process_group(backend, store=store, rank=index, world_size=count, timeout=timedelta(seconds=timeout))
    return Processes.joined()


@contextmanager
def lost_peers() -> Iterator[None]:
    """Tell what torch says when another process is gone, or silent for longer than the time-out, in one line.

    Raises:
        PeerError: for torch's DistError, and for the RuntimeError of gloo, which has no type of its own.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerError(f"another process of the run is gone or silent: {one_line(str(error))[:300]}") from error
        raise


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

    def gather_texts(self, text: str) -> list[str]:
        """What each process says, a line each, in their order."""
        if self.count == 1:
            return [text]
        line = f"{one_line(text)}\n".encode()
        return bytes(self.gather(torch.frombuffer(bytearray(line), dtype=torch.uint8)).tolist()).decode().splitlines()
