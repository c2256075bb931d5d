"""The crowd layer of one matrix per worker with its loss: with torch's kernels some thirty, here two and a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .making import run

MOST, TASKS = 128, 8
"""Classes at most, and tasks, or answers, of a block; the source has them, too."""


def of_classes(n_classes: int) -> bool:
    """Whether `crowd_loss` is made for so many."""
    return n_classes <= MOST


def crowd_loss(
    logits: Tensor, confusion: Tensor, task: Tensor, worker: Tensor, label: Tensor, n: int | Tensor
) -> Tensor:
    """The cross-entropy of the answers, over `n`, for a device that has the kernels and classes that they know.

    Args:
        logits: (tasks, classes) of the classifier.
        confusion: (workers, classes, classes), `CrowdLayer`'s.
        task: (answers,) rows of `logits`.
        worker: (answers,) who answered.
        label: (answers,), below 0 for an answer that is none.
        n: what the sum is divided by; on the device float32 and at least 1.
    """
    given = [part.contiguous() for part in (logits.float(), confusion, task, worker, label)]
    loss: Tensor = _Answered.apply(*given, n)
    return loss


class _Answered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, confusion: Tensor, task: Tensor, worker: Tensor, label: Tensor, n: int | Tensor
    ) -> Tensor:
        tasks, classes = logits.shape
        counted = isinstance(n, Tensor)
        sizes = [tasks, classes, len(label), *((1.0, n, True) if counted else (float(max(n, 1)), logits, False))]
        probability, slope = torch.empty_like(logits), logits.new_empty(len(label), classes)
        loss, threads = logits.new_empty(len(label)), (32, TASKS, 1)
        given = [logits, confusion, task, worker, label, *sizes]
        blocks = -(-tasks // TASKS) + -(-len(label) // TASKS)
        run("answered", ((blocks, 1, 1), threads), [*given, probability, slope, loss])
        ctx.save_for_backward(slope, probability, confusion, task, worker, label)
        ctx.sizes, ctx.threads = sizes, threads
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, probability, confusion, *_ = ctx.saved_tensors
        blocks = -(-len(probability) // TASKS) + len(confusion)
        dlogits, dconfusion = torch.empty_like(probability), torch.empty_like(confusion)
        given = [*ctx.saved_tensors, *ctx.sizes, gradient[0].contiguous(), dlogits, dconfusion]
        run("of_answered", ((blocks, 1, 1), ctx.threads), given)
        return dlogits, dconfusion, None, None, None, None
