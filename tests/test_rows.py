"""Steps that move the workers who answered in them, and nobody else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, SparseAdam

from crowdlayer.learning.crowd_layer import WORKER_MODELS
from crowdlayer.learning.crowd_model import CrowdLoss
from crowdlayer.learning.rows import RowWiseAdam, RowWiseAdamW, RowWiseSGD

N_WORKERS, N_CLASSES = 50, 4


def answers(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of three tasks, and eight answers by five of the workers."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, N_CLASSES, generator=generator)
    task, label = (torch.randint(n, (8,), generator=generator) for n in (3, N_CLASSES))
    return logits, task, torch.randint(5, (8,), generator=generator) * 7, label


def trained(layer: nn.Module, optimizer: Optimizer, steps: int) -> list[Tensor]:
    for step in range(steps):
        logits, task, worker, label = answers(step)
        optimizer.zero_grad()
        CrowdLoss()(layer(logits, task, worker), label, 3).backward()
        optimizer.step()
    return [table.detach().clone() for table in layer.parameters()]


@pytest.mark.parametrize("name", WORKER_MODELS)
def test_a_gradient_has_a_row_per_answer_and_is_the_dense_one(name: str) -> None:
    dense, sparse = (WORKER_MODELS[name](N_WORKERS, N_CLASSES) for _ in range(2))
    sparse.row_wise = True
    logits, task, worker, label = answers(0)
    for layer in (dense, sparse):
        CrowdLoss()(layer(logits, task, worker), label, 3).backward()
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.is_sparse
        assert ours.grad._nnz() == len(worker)
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)


def test_without_momentum_row_wise_sgd_is_sgd() -> None:
    dense, sparse = (WORKER_MODELS["matrix"](N_WORKERS, N_CLASSES) for _ in range(2))
    sparse.row_wise = True
    ours = trained(sparse, RowWiseSGD(sparse.parameters(), lr=0.5), 5)
    torch.testing.assert_close(ours, trained(dense, SGD(dense.parameters(), lr=0.5), 5))


@pytest.mark.parametrize("adam", [False, True])
def test_a_row_that_always_moves_moves_as_in_the_dense_optimiser(adam: bool) -> None:
    rows, table = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    ours: Optimizer = RowWiseAdam([rows], lr=0.1) if adam else RowWiseSGD([rows], lr=0.1, momentum=0.9)
    theirs: Optimizer = Adam([table], lr=0.1) if adam else SGD([table], lr=0.1, momentum=0.9)
    for step in range(4):
        gradient = torch.tensor([[1.0 + step, -2.0]])
        rows.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), gradient, (3, 2), check_invariants=True)
        table.grad = torch.zeros(3, 2)
        table.grad[1] = gradient
        ours.step()
        theirs.step()
    torch.testing.assert_close(rows, table)


def test_row_wise_adam_is_torchs_sparse_adam() -> None:
    mine, torchs = (WORKER_MODELS["stochastic"](N_WORKERS, N_CLASSES) for _ in range(2))
    mine.row_wise = torchs.row_wise = True
    # The two differ in what eps is added to.
    ours = trained(mine, RowWiseAdam(mine.parameters(), lr=0.1, eps=1e-30), 5)
    torch.testing.assert_close(ours, trained(torchs, SparseAdam(list(torchs.parameters()), lr=0.1, eps=1e-30), 5))


@pytest.mark.parametrize("kind", [RowWiseSGD, RowWiseAdam, RowWiseAdamW])
def test_who_does_not_answer_does_not_move_and_dense_parameters_move_as_ever(
    kind: type[RowWiseSGD | RowWiseAdam],
) -> None:
    layer = WORKER_MODELS["matrix"](N_WORKERS, N_CLASSES)
    layer.row_wise = True
    other = nn.Parameter(torch.ones(2))
    optimizer = kind([{"params": [other]}, {"params": list(layer.parameters())}], lr=0.1)
    logits, task, worker, label = answers(0)
    (CrowdLoss()(layer(logits, task, worker), label, 3) + other.sum()).backward()
    optimizer.step()
    moved = (layer.matrices() != torch.eye(N_CLASSES)).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == sorted(set(worker.tolist()))
    assert (other < 1).all()
