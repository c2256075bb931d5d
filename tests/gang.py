"""Real processes that train together, with gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from crowdlayer.machine import processes
from crowdlayer.machine.launch import Launch
from crowdlayer.machine.meeting import Meeting
from tests.servers import free_port

T = TypeVar("T")

TIMEOUT = 120
"""Seconds that they wait for each other on a busy machine."""


def together(n: int, function: Callable[..., T], *arguments: Any) -> list[T]:
    """What `function`, of a module of the tests, returns in each of `n` processes that have joined."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(n)]
    started = [
        context.Process(target=_one, args=(index, n, port, pipes[index][1], function, arguments)) for index in range(n)
    ]
    for process in started:
        process.start()
    try:
        for _, theirs in pipes:
            theirs.close()
        return [pickle.loads(ours.recv_bytes()) for ours, _ in pipes]
    finally:
        for process in started:
            process.join(TIMEOUT)
            process.kill()


def _one(
    index: int, n: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    launch = Launch(port=port)
    processes.join((Meeting.join if index else Meeting.host)(launch, TIMEOUT), index, n)
    pipe.send_bytes(pickle.dumps(function(*arguments)))  # tensors by value: their process is gone when they are read
    os._exit(0)  # torch's teardown takes seconds
