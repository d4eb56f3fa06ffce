"""Training curves: bf16 and FP8 beside fp32 reference kernels, two GPUs beside one, and kernels that stay compiled."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.config.schema import KernelsConfig, ParallelConfig, PrecisionConfig, RunConfig
from oryx_megatron.model.warm import compile_in_turn
from oryx_megatron.ops import backends
from oryx_megatron.testing import layouts, run_distributed
from oryx_megatron.testing.layouts import session, tiny_run, train_and_resume
from oryx_megatron.testing.masters import compare_masters

STEPS, WINDOW = 200, 20
WIDE = {
    "model__hidden_size": 256,
    "model__ffn_hidden_size": 512,
    "model__qk_head_dim": 128,
    "model__v_head_dim": 128,
    "model__num_heads": 4,
    "model__num_kv_heads": 4,
    "model__num_layers": 4,
    "data__sequence_length": 256,
    "modes__chunk": 64,
    "train__iterations": STEPS,
    "train__global_batch_size": 8,
    "train__micro_batch_size": 4,
    "optimizer__lr": 1e-3,
}
REFERENCE = KernelsConfig(**dict.fromkeys(backends.PARTS, "reference"))
BOUNDS = {"bf16": 0.01, "tensorwise": 0.02, "delayed": 0.02, "delayed, attention too": 0.02}
"""Largest relative distance of the loss, averaged over WINDOW steps, from fp32's, at any time of the run."""


class Chain(layouts.SyntheticText):
    """Text in which a token follows from the last one seven times of ten: learned steadily, without sudden insights."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length, vocab = self.run.data.sequence_length, self.run.model.vocab_size
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(1, vocab, (length + 1,), generator=generator)
        follows = torch.rand(length + 1, generator=generator) < 0.7
        text = noise.clone()
        for i in range(1, length + 1):
            if follows[i]:
                text[i] = (text[i - 1] * 5 + 7) % vocab
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(length)}


def losses(run: RunConfig, kernels: KernelsConfig, steps: int) -> list[float]:
    layouts.SyntheticText = Chain
    platform.install()
    backends.select(kernels, backends.Workload(run.model, run.precision.dtype))
    with session(run) as opened:
        return [loss for loss, _ in opened.steps(steps)]


@pytest.fixture(scope="module", params=["gdn", "mamba2"])
def fp32(request) -> tuple[str, list[float]]:
    run = tiny_run(request.param, **WIDE)
    return request.param, losses(run, REFERENCE, STEPS)


@pytest.mark.parametrize("precision", BOUNDS)
def test_curve_stays_beside_fp32(fp32, precision):
    mixer, want = fp32
    recipe, _, attention = precision.partition(", ")
    if recipe != "bf16" and (reason := platform.transformer_engine_missing()):
        pytest.skip(reason)
    fp8 = {} if recipe == "bf16" else {"fp8": recipe, "fp8_attention": bool(attention)}
    run = tiny_run(mixer, **WIDE, precision=PrecisionConfig(dtype="bf16", **fp8))
    found = losses(run, KernelsConfig(), STEPS)
    assert want[-1] < 0.6 * want[0]
    for name, curve in (("fp32", want), (precision, found)):
        print(mixer, name, " ".join(f"{x:.3f}" for x in curve[:: STEPS // 10]), f"{curve[-1]:.4f}")
    for start in range(0, STEPS - WINDOW + 1, WINDOW):
        a, b = (sum(curve[start : start + WINDOW]) / WINDOW for curve in (found, want))
        assert abs(a - b) < BOUNDS[precision] * b, (start, a, b)


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_resumes_from_a_checkpoint(mixer, tmp_path):
    run = tiny_run(mixer, **WIDE, precision=PrecisionConfig())
    platform.install()
    backends.select(KernelsConfig(), backends.Workload(run.model, "bf16"))
    going, resumed = train_and_resume(run, tmp_path, before=3, after=5)
    assert resumed == pytest.approx(going[3:], rel=1e-3)


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_optimizer_state_in_host_memory(mixer, tmp_path):
    """optimizer.cpu_offload: losses as without, 12 bytes a parameter less on the GPU, and a bit-exact resume."""
    platform.install()
    curves, memory, parameters = [], [], 0
    for offload in (False, True):
        run = tiny_run(mixer, **WIDE, precision=PrecisionConfig(), optimizer__cpu_offload=offload)
        backends.select(KernelsConfig(), backends.Workload(run.model, "bf16"))
        gc.collect()  # what tests before this one left counts on neither side
        before = torch.cuda.memory_allocated()
        with session(run) as opened:
            first = opened.steps(3)
            memory.append(torch.cuda.memory_allocated() - before)
            parameters = sum(p.numel() for chunk in opened.chunks for p in chunk.parameters())
            manager = opened.checkpoints(tmp_path / str(offload))
            assert manager.save(3, opened.manifest) or manager.wait()
            curves.append([loss for loss, _ in [*first, *opened.steps(5)]])
        with session(run, iteration=3) as opened:
            assert opened.checkpoints(tmp_path / str(offload)).load() is not None
            assert [loss for loss, _ in opened.steps(5)] == pytest.approx(curves[-1][3:], rel=1e-3)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert memory[0] - memory[1] > 11 * parameters


TWO = {
    "tensor": ParallelConfig(tensor=2),
    "pipeline": ParallelConfig(pipeline=2),
    "context": ParallelConfig(context=2),
    "data": ParallelConfig(overlap=True),
    "virtual stages": ParallelConfig(pipeline=2, virtual_pipeline=2, overlap=True),
}


def few_losses(parallel: ParallelConfig, mixer: str) -> list[float]:
    return losses(tiny_run(mixer, **WIDE, parallel=parallel, precision=PrecisionConfig()), KernelsConfig(), 10)


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
@pytest.mark.parametrize("name", TWO)
def test_two_gpus_compute_what_one_does(name, mixer):
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    found = run_distributed(few_losses, 2, TWO[name], mixer)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(few_losses(ParallelConfig(), mixer), rel=5e-3)


def losses_under_overlap(root: Path) -> tuple[list[float], list[float]]:
    run = tiny_run("gdn", **WIDE, parallel=ParallelConfig(overlap=True), precision=PrecisionConfig())
    platform.install()
    backends.select(KernelsConfig(), backends.Workload(run.model, "bf16"))
    return train_and_resume(run, root, before=3, after=3)


def test_checkpoints_under_overlap_hold_the_weights_of_their_step(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    going, resumed = run_distributed(losses_under_overlap, 2, tmp_path)[0]
    assert resumed == pytest.approx(going[3:], rel=1e-3)
    compared, apart = compare_masters(tmp_path / "iteration_0000003")
    assert compared > 10
    assert not apart


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_new_plans_compile_nothing(mixer, tmp_path):
    if backends.FUSED_RECURRENCE and (reason := platform.missing_package("triton", gpu=True)):
        pytest.skip(reason)
    (counts,) = run_distributed(compiled_files, 1, mixer, str(tmp_path))
    warm, later = counts
    assert warm > 0
    assert later == warm


def compiled_files(mixer: str, folder: str) -> tuple[int, int]:
    """Files in the kernel caches after warming up, and after ten steps of drawn plans."""
    for variable in platform.KERNEL_CACHES:
        os.environ.pop(variable, None)
    platform.use_kernel_cache(folder)
    run = tiny_run(mixer, **WIDE, precision=PrecisionConfig())
    platform.install()
    backends.select(KernelsConfig(), backends.Workload(run.model, "bf16"))
    with session(run) as opened:
        compile_in_turn(run, opened.chunks)
        opened.step()  # what lies outside the mixers, as the loss
        before = _count(folder)
        opened.steps(10)
        return before, _count(folder)


def _count(folder: str) -> int:
    names = itertools.chain.from_iterable(Path(folder).rglob(f"*.{end}") for end in ("cubin", "so", "o"))
    return len(list(names))
