"""What transformers' users do with any of its models, done with Oryx: the same right values as elsewhere.

`make hf-suite` runs transformers' own tests of this kind; these are the ones it lacks, or that need no download.
"""

from __future__ import annotations

import pytest
import torch
from hf_reference import tiny_config, tiny_model
from transformers.utils import logging

from oryx_megatron.hf import modeling_oryx
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM

MIXERS = ("gdn", "mamba2")
PLANS = ("attention", "recurrent", "every:2")


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_reach_the_attentions(mixer: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient at `attentions[0]` is what the loss does when those weights are moved."""
    model = tiny_model(mixer, attn_implementation="eager", mode_plan=plan)
    ids = random_ids(2, 9)
    out = model(ids, output_attentions=True)
    torch.testing.assert_close(out.logits, model(ids).logits, atol=1e-12, rtol=0)
    weights = out.attentions[0]
    weights.retain_grad()
    out.logits.square().mean().backward()
    attends = modeling_oryx.plan_mask(plan, 9, chunk=model.config.mode_chunk)
    assert not weights.grad[:, :, ~attends].any()  # nobody reads them
    if not attends.any():
        return
    direction = torch.randn(weights.shape, dtype=weights.dtype, generator=torch.Generator().manual_seed(3)).tril()
    eager = modeling_oryx.eager_attention_forward

    def moved(step: float) -> float:
        runs = iter(modeling_oryx.TokenModes.from_mask(attends[None], ids.device).runs)

        def forward(module, query, key, value, mask, **kwargs):
            _, w = eager(module, query, key, value, mask, **kwargs)
            if module is model.model.layers[0].mixer:
                start, stop = next(runs)
                w = w + step * direction[:, :, start:stop, : w.shape[-1]]
            return (w @ value.repeat_interleave(2, 1)).transpose(1, 2), w

        monkeypatch.setattr(modeling_oryx, "eager_attention_forward", forward)
        with torch.no_grad():
            return model(ids).logits.square().mean().item()

    slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert abs(slope) > 1e-4
    assert (weights.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_attentions_under_sdpa_are_a_warning() -> None:
    model = tiny_model("gdn", attn_implementation="sdpa")
    logging.warning_once.cache_clear()
    heard: list[str] = []
    handler = type("Handler", (logging.logging.Handler,), {"emit": lambda self, record: heard.append(record.msg)})()
    modeling_oryx.logger.addHandler(handler)
    try:
        with torch.no_grad():
            out = model(random_ids(1, 5), output_attentions=True)
    finally:
        modeling_oryx.logger.removeHandler(handler)
    assert out.attentions == ()
    assert len(heard) == 1
    assert "attn_implementation='eager'" in heard[0]
    torch.testing.assert_close(out.logits, model(random_ids(1, 5)).logits)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decays_stay_in_fp32(mixer: str, dtype: torch.dtype, tmp_path) -> None:
    """By from_config as by from_pretrained, and with the same values before and after."""
    new = OryxForCausalLM._from_config(tiny_config(mixer), dtype=dtype)
    new.save_pretrained(tmp_path)
    back = OryxForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wide = {"a_log", "dt_bias", "d_skip"}
    for (name, one), two in zip(new.named_parameters(), back.parameters(), strict=True):
        assert one.dtype == two.dtype == (torch.float32 if name.split(".")[-1] in wide else dtype), name
        assert torch.equal(one, two)
    assert OryxForCausalLM._from_config(tiny_config(mixer), dtype=torch.float64).model.layers[0].mixer.a_log.dtype == (
        torch.float64
    )
