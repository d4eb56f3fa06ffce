"""Muon: orthogonal updates, torch's own Muon as a yardstick, AdamW for what is no matrix, config errors."""

import pytest
import torch

from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.config.validate import validate
from oryx_megatron.errors import ConfigError
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train.layerwise import dealt
from oryx_megatron.train.muon import Matrix, Muon, orthogonalized


class _Alone:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _muon(parameter: torch.nn.Parameter, matrix: Matrix | None, weight_decay: float = 0.1) -> Muon:
    return Muon(
        [{"params": [parameter]}],
        matrix_of=lambda p: matrix,
        group=_Alone(),  # type: ignore[arg-type]
        lr=0.02,
        weight_decay=weight_decay,
        momentum=0.95,
        betas=(0.9, 0.95),
        eps=1e-8,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_orthogonalized(shape: tuple[int, int]) -> None:
    """Singular values over a decade come close to 1; five steps lift not the smallest of any random matrix so far."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, min(shape), generator=generator))[0] for n in shape)
    matrix = left * torch.linspace(0.1, 1.0, min(shape)) @ right.T
    values = torch.linalg.svdvals(orthogonalized(matrix, torch.float32))
    assert values.min() > 0.5
    assert values.max() < 1.3


def _steps(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameter.detach()


def test_equals_torch_muon() -> None:
    start = torch.randn(24, 40)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    expected = _steps(
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"), theirs
    )
    moved = _steps(_muon(ours, Matrix((24,), 0)), ours) - start
    # torch multiplies in bf16, we in fp32 for a model in fp32.
    assert (moved - (expected - start)).norm() < 0.03 * moved.norm()


def test_equals_torch_adamw() -> None:
    start = torch.randn(24)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    torch.testing.assert_close(_steps(_muon(ours, None), ours), _steps(adamw, theirs))


def test_parts_are_matrices_of_their_own() -> None:
    first, second = torch.randn(8, 16), torch.randn(24, 16)
    fused = torch.nn.Parameter(torch.zeros(32, 16))
    fused.grad = torch.cat((first, 100 * second))
    _muon(fused, Matrix((8, 24), 0), weight_decay=0.0).step()
    for part, gradient in ((fused[:8], first), (fused[8:], second)):
        alone = torch.nn.Parameter(torch.zeros_like(gradient))
        alone.grad = gradient
        _muon(alone, Matrix((len(gradient),), 0), weight_decay=0.0).step()
        torch.testing.assert_close(part.detach(), alone.detach(), rtol=1e-3, atol=1e-5)


def test_parameters_are_dealt_out_evenly() -> None:
    """Each to one rank; the two largest, as embedding and output of a large vocabulary, never to the same."""
    sizes = [1000, 1000, *range(1, 60)]
    parameters = [torch.empty(size, device="meta") for size in sizes]
    for ranks in (1, 2, 3, 7, 80):
        shares = dealt(parameters, ranks, torch.Tensor.numel)
        assert sorted(id(p) for share in shares for p in share) == sorted(map(id, parameters))
        loads = [sum(p.numel() for p in share) for share in shares]
        assert max(loads) <= max(1000, sum(sizes) / ranks + 59)
        assert len(shares) == ranks


def test_config_errors() -> None:
    validate(tiny_run(optimizer__name="muon"), 1)
    whole = ParallelConfig(distributed_optimizer=False)
    with pytest.raises(ConfigError, match=r"optimizer.cpu_offload: offloads AdamW's state only"):
        validate(tiny_run(parallel=whole, optimizer__name="muon", optimizer__cpu_offload=True), 1)
    with pytest.raises(ConfigError, match=r"optimizer.cpu_offload: needs parallel.distributed_optimizer"):
        validate(tiny_run(parallel=whole, optimizer__cpu_offload=True), 1)
    validate(tiny_run(parallel=whole, optimizer__name="muon"), 1)
