"""parallel.overlap under plans that differ between data-parallel ranks, with buckets smaller than a layer."""

from __future__ import annotations

import functools

import pytest

from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.testing import run_distributed

LAYOUTS = {
    "plain": ParallelConfig(),
    "overlap": ParallelConfig(overlap=True),
    "unsharded": ParallelConfig(overlap=True, distributed_optimizer=False),
}
CASES = [("plain", 0), ("overlap", 3000), ("overlap", 400), ("unsharded", 400)]


MIXERS = ["gdn", "mamba2", "fused gdn", "fused mamba2"]


def curves(mixer: str) -> tuple[list[list[tuple[float, float]]], list[int]]:
    from oryx_megatron.model import build
    from oryx_megatron.model.config import transformer_config
    from oryx_megatron.model.mixer import OryxMixer
    from oryx_megatron.testing import fused_steps
    from oryx_megatron.testing.layouts import session, tiny_run
    from oryx_megatron.train import optimizer

    if mixer.startswith("fused"):
        fused_steps.install()
        build.transformer_config = functools.partial(transformer_config, **fused_steps.FUSED)  # type: ignore[assignment]
    found, buckets = [], []
    for name, bucket in CASES:
        optimizer.BUCKET = bucket
        with session(tiny_run(mixer.split()[-1], parallel=LAYOUTS[name])) as opened:
            for module in opened.chunks[0].modules():
                if isinstance(module, OryxMixer) and mixer.startswith("fused") and name != "plain":
                    # As TransformerEngine's linears have it: gradients are in their buffers when the hooks run.
                    module.in_proj.fuse_wgrad_accumulation = True
            buckets.append(len(opened.chunks[0].bucket_groups))
            found.append(opened.steps(5))
    return found, buckets


@pytest.mark.parametrize("mixer", MIXERS)
def test_losses_are_those_without_overlap(mixer):
    """Weights that no module call reads are waited for (convolutions, head norms, all projections of fused mixers), and
    ranks reduce in one order though their plans differ."""
    for (plain, *others), buckets in run_distributed(curves, 2, mixer):
        for found in others:
            assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in plain], rel=1e-5)
            assert [norm for _, norm in found] == pytest.approx([norm for _, norm in plain], rel=1e-4)
        assert buckets[0] == 1
        assert buckets[1] > 8
        assert buckets[2] > 20
