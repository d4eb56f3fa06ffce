"""An export's recurrences are training's, bit for bit, also where gates are at their ends."""

from __future__ import annotations

import pytest
import torch
from hf_reference import tiny_config
from torch import Tensor, nn
from written_out import CASES, HEADS, VARIANTS, call, extremes, recurrence

from oryx_megatron.hf.layers_oryx import OryxContext, OryxTokenMixer
from oryx_megatron.hf.modes_oryx import TokenModes
from oryx_megatron.ops import gated_delta_rule, ssd

TRAINING = {"mamba2": ssd, "gdn": gated_delta_rule}


def by_export(variant: str, x: dict[str, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """What the mixer of an export makes of these queries, keys, values and raw gates: outputs and the last state."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": x["k"].shape[-1]}
    config = tiny_config(variant, value_head_dim=x["v"].shape[-1], recurrence_chunk=chunk, kernels="torch", **sizes)
    mixer = OryxTokenMixer(config)
    for name in HEADS[variant]:
        getattr(mixer, "d_skip" if name == "d" else name).data = x[name]
    mixer.decay_proj = nn.Identity()
    mixer._query = lambda hidden, mode: x["q"]
    raw = x["dt"] if variant == "mamba2" else x["raw"]
    context = OryxContext(TokenModes.uniform(False, raw.shape[1]))
    return mixer._recur(raw, x["k"], x["v"], x["initial"], None, context)


@pytest.mark.parametrize("case", [*CASES, "random"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_training_in_fp32(variant: str, case: str) -> None:
    """At 100 tokens in chunks of 16, and step by step; 1e-6 of the largest value is a few roundings of fp32."""
    exact = extremes(variant, case)
    given = {name: tensor.float() for name, tensor in exact.items()}
    for length in (100, 7):
        short = {name: x if x.dim() == 1 or name == "initial" else x[:, :length] for name, x in given.items()}
        if variant == "gdn":  # both sides read the two gates as parts of one projection
            short["raw"] = torch.cat([short["a"], short["b"]], -1)
            short["a"], short["b"] = short["raw"].chunk(2, -1)
        with torch.no_grad():
            theirs = by_export(variant, short, chunk=16)
            ours = call(TRAINING[variant], variant, short, final=True, chunk=16)
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
        want = recurrence(variant, {name: x.double() for name, x in short.items()})
        for got, right in zip(theirs, want, strict=True):
            assert (got.double() - right).abs().max() <= 1e-6 * max(1.0, right.abs().max())
