"""What transformers' users do with any of its models, done with Oryx: the same right values as elsewhere.

`make hf-suite` runs transformers' own tests of this kind; these are the ones it lacks, or that need no download.
"""

from __future__ import annotations

import pytest
import torch
from hf_reference import tiny_config, tiny_model
from transformers.utils import logging

from oryx_megatron.hf import modeling_oryx
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM, plan_mask

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


@pytest.mark.parametrize("plan", ["prefix:5", "last:5", "prompt:prefix:5,new:last:5"])
def test_a_default_plan_holds_for_shorter_texts(plan: str) -> None:
    """Evaluation gives one model texts of any length: the first or last N of fewer are all."""
    model = tiny_model("gdn", dtype=torch.float32, mode_plan=plan)
    for length in (1, 3, 5, 8):
        ids = random_ids(1, length)
        prompts = plan.removeprefix("prompt:").partition(",")[0]
        kind, _, n = prompts.partition(":")
        mask = torch.arange(length) < int(n) if kind == "prefix" else torch.arange(length) >= length - int(n)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids, mode_plan=mask).logits)
        out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
        whole = plan_mask(plan, length + 2, chunk=1, prompt=length, shorter=True)
        with torch.no_grad():
            logits = model(out.sequences, mode_plan=whole).logits[0, length - 1 : -1]
        torch.testing.assert_close(torch.cat(out.logits), logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="5 tokens are more than the"):  # what a call asks for is done as asked
        model(random_ids(1, 3), mode_plan=prompts)


def test_last_tokens_need_an_end() -> None:
    """Scores of texts that a harness pads without a mask would depend on its batch size."""
    model = tiny_model("gdn", mode_plan="last:2")
    ids = random_ids(3, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match="no attention_mask says where the 3 texts of this batch end"):
        model(ids)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for row, n in enumerate((6, 4, 6)):
            torch.testing.assert_close(logits[row, :n], model(ids[row : row + 1, :n]).logits[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("plan", ["atention", "prompt:attention", "runs:a0-5,r6-9", "every:0", "prefix:-1", "", 7])
def test_a_default_plan_that_is_none_is_refused_at_once(plan: object, tmp_path) -> None:
    tiny_model("gdn").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mode.plan") as refused:
        OryxForCausalLM.from_pretrained(tmp_path, mode_plan=plan)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("modes", "plan"), [("recurrent", "attention"), ("attention", "prompt:attention,new:recurrent")]
)
def test_a_baseline_has_one_plan(modes: str, plan: str) -> None:
    with pytest.raises(ValueError, match=f"{modes} mode only"):
        OryxForCausalLM(tiny_config("gdn", modes=modes, mode_plan=plan))


def test_masks_of_pairs_are_refused() -> None:
    ids = random_ids(2, 4)
    with pytest.raises(ValueError, match="a recurrence cannot follow a mask of pairs") as refused:
        tiny_model("gdn")(ids, attention_mask=torch.ones(2, 1, 4, 4))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"return_dict_in_generate": True}], ids=str)
def test_embeddings_with_a_static_cache(mixer: str, options: dict) -> None:
    """The same new tokens as from the tokens themselves, padded or not."""
    model = tiny_model(mixer, dtype=torch.float32, mode_plan="prompt:every:2,new:recurrent")
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    for given in ({}, {"attention_mask": mask}):
        texts = []
        for inputs in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
            for form in (None, "static"):
                out = model.generate(**inputs, **given, **options, cache_implementation=form)
                texts.append((out if isinstance(out, torch.Tensor) else out.sequences)[:, -6:].tolist())
        assert texts[1:] == texts[:1] * 3


def test_a_shorter_static_generation_runs_what_is_compiled() -> None:
    model = tiny_model("gdn", dtype=torch.float32)
    rooms = []
    for new in (20, 5, 12, 30):
        out = model.generate(
            random_ids(1, 4), max_new_tokens=new, cache_implementation="static", return_dict_in_generate=True
        )
        rooms.append(out.past_key_values.get_max_length())
    assert rooms == [23, 23, 23, 33]  # the last new token is never read
