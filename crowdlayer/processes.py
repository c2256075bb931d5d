"""The processes of a run, and what they tell each other.

Every method of `Processes` but the two of `mine` is collective: all processes call it, in the same order. What is said
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

from .errors import PeerError, one_line


def join(timeout: float) -> Processes:
    """Meet the others that torch's variables (RANK, WORLD_SIZE, MASTER_ADDR …) tell of.

    Args:
        timeout: seconds to wait for the others, now and whenever they shall say something.

    Raises:
        PeerError: they do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with lost_peers():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
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
