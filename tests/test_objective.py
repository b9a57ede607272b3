"""The losses, compared with slow code, known values and symmetries; two processes compared with one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import step_model
from benchmarks.plain import plain_nt_xent
from stec.config import ObjectiveSettings
from stec.distributed import processes
from stec.models.model import Outputs
from stec.objectives import simclr
from stec.objectives.inverse import inverse_loss, value_bins
from stec.objectives.objective import Objective
from stec.objectives.simclr import nt_xent

EPS = torch.finfo(torch.float32).eps
VERSIONS: tuple[Callable[..., Any], ...] = (nt_xent, plain_nt_xent)


def unit_vectors(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(2, count, 8, generator=generator, dtype=torch.float64), dim=-1)
    return z[0], z[1]


def slow_nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> float:
    """Equation 1 of the SimCLR paper, one pair at a time."""
    z, count, total = torch.cat([z_i, z_j]), len(z_i), 0.0
    for a in range(2 * count):
        partner = (a + count) % (2 * count)
        similarities = [math.exp(float(z[a] @ z[b]) / temperature) for b in range(2 * count) if b != a]
        total -= math.log(math.exp(float(z[a] @ z[partner]) / temperature) / sum(similarities))
    return total / (2 * count)


def double_nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor]:
    """The loss in double precision, differentiated by autograd."""
    z = torch.cat([z_i, z_j])
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return (F.cross_entropy(logits, torch.arange(len(z)).roll(len(z_i))),)


def test_nt_xent_is_the_papers() -> None:
    z_i, z_j = unit_vectors(9)
    assert nt_xent(z_i, z_j, 0.3)[0].item() == pytest.approx(slow_nt_xent(z_i, z_j, 0.3), rel=1e-6)


def test_nt_xent_of_orthogonal_pairs_is_known() -> None:
    """Partners equal, all others orthogonal: log(1 + 2 (N - 1) exp(-1 / T))."""
    z = torch.eye(6)
    loss, accuracy, cross_view_accuracy, _ = nt_xent(z, z, 0.5)
    assert loss.item() == pytest.approx(math.log(1 + 10 * math.exp(-2)), rel=1e-6)
    assert accuracy.item() == cross_view_accuracy.item() == 1


def test_nt_xent_is_symmetric_in_its_views() -> None:
    z_i, z_j = unit_vectors(9)
    torch.testing.assert_close(nt_xent(z_i, z_j, 0.1)[0], nt_xent(z_j, z_i, 0.1)[0])


def test_nt_xent_in_half_precision_is_computed_in_single() -> None:
    z_i, z_j = (z.to(torch.bfloat16) for z in unit_vectors(9))
    with torch.autocast("cpu", torch.bfloat16):
        half = nt_xent(z_i, z_j, 0.1)[0]
    torch.testing.assert_close(half, nt_xent(z_i.float(), z_j.float(), 0.1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_nt_xent_in_chunks_is_the_plain_one(
    dtype: torch.dtype, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, metrics and gradients, with chunks of any size; both have errors of single precision."""
    z_i, z_j = unit_vectors(13)
    z_j = F.normalize(z_i + 0.5 * z_j, dim=1)
    monkeypatch.setattr(simclr, "CHUNK_BYTES", chunk_rows * 4 * 26)
    outcomes = []
    functions: tuple[Callable[..., Any], ...] = (*VERSIONS, double_nt_xent)
    for function, kind in zip(functions, (dtype, dtype, torch.float64), strict=True):
        leaves = [z.to(kind).requires_grad_() for z in (z_i, z_j)]
        loss, *metrics = function(*leaves, 0.1)
        (3 * loss).backward()
        outcomes.append([value.double() for value in (loss.detach(), *[leaf.grad for leaf in leaves], *metrics)])
    ours, plain, exact = outcomes
    for k, expected in enumerate(exact):
        error, yardstick = ((values[k] - expected).abs().max() for values in (ours, plain))
        assert error <= 4 * yardstick + 4 * EPS * expected.abs().max()
    for value, expected in zip(ours[len(exact) :], plain[len(exact) :], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_nt_xent_never_holds_the_similarity_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simclr, "CHUNK_BYTES", 2**16)
    leaves = [z.float().requires_grad_() for z in unit_vectors(256)]
    sizes = []
    for function in VERSIONS:
        with LargestTensor() as largest:
            function(*leaves, 0.1)[0].backward()
        sizes.append(largest.bytes)
    assert sizes == [2**16, 512 * 512 * 4]


def test_bins_are_equal_parts_of_their_range() -> None:
    low, high = np.array([-2, -2, -0.5]), np.array([2, 2, 0.5])
    values = np.random.default_rng(0).uniform(-3, 3, (500, 2, 3))
    expected = np.clip(np.floor((values - low) / (high - low) * 6), 0, 5)
    np.testing.assert_array_equal(value_bins(torch.from_numpy(values), 6), expected)


def test_masked_pairs_leave_no_trace() -> None:
    """Neither in the loss nor in the gradient, even if they are not finite."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, 2, 3, generator=generator)
    command, valid = torch.randn(5, 2, 3, generator=generator), torch.tensor([True, False, True, False, True])
    expected, _ = inverse_loss(logits[valid], command[valid], torch.ones(3, dtype=torch.bool))
    logits[1] = math.inf
    logits.requires_grad_()
    loss, _ = inverse_loss(logits, command, valid)
    torch.testing.assert_close(loss, expected)


def test_no_valid_pair_is_no_loss() -> None:
    logits = torch.randn(4, 6, 2, 3, requires_grad=True)
    loss, _ = inverse_loss(logits, torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def some_outputs() -> tuple[Outputs, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z_i, z_j = unit_vectors(8)
    outputs = Outputs(
        projections=torch.stack([z_i, z_j], 1),
        inverse={"window": torch.randn(8, 6, 2, 3, generator=generator, dtype=torch.float64)},
        class_logits=torch.randn(8, 2, 5, generator=generator, dtype=torch.float64),
    )
    command = torch.randn(8, 2, 3, generator=generator, dtype=torch.float64)
    # Three pairs of the first half are valid and one of the second: the processes must have different weights.
    valid = torch.tensor([True, True, True, False, False, False, False, True])
    return outputs, command, valid, torch.arange(8) % 5


def tensors_of(outputs: Outputs) -> list[Tensor]:
    assert outputs.projections is not None and outputs.class_logits is not None
    return [outputs.projections, outputs.inverse["window"], outputs.class_logits]


def outputs_of(tensors: list[Tensor]) -> Outputs:
    projections, of_window, class_logits = tensors
    return Outputs(projections, {"window": of_window}, class_logits)


def test_the_sum_is_weighted() -> None:
    outputs, command, valid, labels = some_outputs()
    settings = ObjectiveSettings(discrimination_lambda=2, manip_lambda=0.3, supervised_lambda=0.5, temperature=0.2)
    loss, tensors = Objective(settings)(outputs, labels, {"window": (command, valid)})
    metrics = {name: value.item() for name, value in tensors.items()}
    expected = 2 * metrics["contrastive_loss"] + 0.3 * metrics["inverse_loss"] + 0.5 * metrics["classifier_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-6) == pytest.approx(metrics["loss"], rel=1e-6)
    both = torch.cat([outputs.class_logits[:, 0], outputs.class_logits[:, 1]])
    assert metrics["classifier_loss"] == pytest.approx(F.cross_entropy(both, labels.repeat(2)).item(), rel=1e-6)


def half_of_the_work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    simclr.CHUNK_BYTES = 3 * 4 * 16
    outputs, command, valid, labels = some_outputs()
    rows = slice(4 * rank, 4 * rank + 4)
    leaves = [tensor[rows].clone().requires_grad_() for tensor in tensors_of(outputs)]
    objective = Objective(ObjectiveSettings(manip_lambda=1.0, temperature=0.2))
    loss, metrics = objective(outputs_of(leaves), labels[rows], {"window": (command[rows], valid[rows])})
    loss.backward()
    torch.save([metrics, *[leaf.grad for leaf in leaves]], folder / f"rank{rank}.pt")

    all_gather, sent = processes.all_gather, []

    def counted(gathered: Tensor, local: Tensor) -> None:
        sent.append(local.numel() * local.element_size())
        all_gather(gathered, local)

    with patch.object(processes, "all_gather", counted):
        z_i, z_j = (z.float().requires_grad_() for z in leaves[0].detach().unbind(1))
        nt_xent(z_i, z_j, 0.2)[0].backward()
    (folder / f"sent{rank}").write_text(str(sum(sent)))
    dist.destroy_process_group()


def test_a_head_that_is_absent_has_no_metrics() -> None:
    """SimCLR, and only the online classifier; the loss is the weighted sum of the other heads' losses."""
    outputs, _, _, labels = some_outputs()
    objective = Objective(ObjectiveSettings(discrimination_lambda=2, supervised_lambda=0.5))
    contrastive = {"loss", "contrastive_loss", "contrastive_accuracy", "cross_view_accuracy", "cross_view_entropy"}
    loss, metrics = objective(Outputs(outputs.projections, {}, None), labels)
    assert metrics.keys() == contrastive and loss == 2 * metrics["contrastive_loss"]
    loss, metrics = objective(Outputs(None, {}, outputs.class_logits), labels)
    assert metrics.keys() == {"loss", "classifier_loss", "classifier_accuracy"}
    assert loss.item() == pytest.approx(0.5 * metrics["classifier_loss"].item(), rel=1e-6)


def test_the_softmax_kernel_is_autograds() -> None:
    """``aten._log_softmax_backward_data`` is not public: if PyTorch changes it, NT-Xent's gradient must be adapted."""
    logits, gradient = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    logits.requires_grad_()
    log_p = logits.log_softmax(1)
    log_p.backward(gradient)
    assert torch.equal(simclr._log_softmax_gradient(gradient, log_p.detach()), logits.grad)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The mean loss of two gloo processes, and its gradient, are those of one process with the whole batch."""
    outputs, command, valid, labels = some_outputs()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors_of(outputs)]
    objective = Objective(ObjectiveSettings(manip_lambda=1.0, temperature=0.2))
    loss, metrics = objective(outputs_of(leaves), labels, {"window": (command, valid)})
    loss.backward()

    mp.spawn(half_of_the_work, args=(tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, value in metrics.items():
        average = (ranks[0][0][name] + ranks[1][0][name]) / 2
        torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-7)
    for k, leaf in enumerate(leaves):
        # Gradient averaging divides by the number of processes.
        gradient = torch.cat([ranks[0][1 + k], ranks[1][1 + k]]) / 2
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-8)

    sizes = step_model.Sizes(gradients=0, channels=[], feat_dim=outputs.projections.shape[2])
    assert [int((tmp_path / f"sent{rank}").read_text()) for rank in range(2)] == [
        step_model.gathered_bytes(sizes, 4)
    ] * 2
