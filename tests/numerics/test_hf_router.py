"""`router:R` in the Hugging Face model: one pass, decoding, padding, caches, beams, packed documents, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.modeling_oryx import OryxCache, OryxForCausalLM

PLAN = "router:0.4"


@pytest.fixture(scope="module", params=["gdn", "mamba2"])
def model(request: pytest.FixtureRequest) -> OryxForCausalLM:
    """Random weights in fp32 with a router whose thresholds are its own quantiles."""
    torch.manual_seed(0)
    config = OryxConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        value_head_dim=16, mixer=request.param, recurrence_chunk=8, eos_token_id=60, pad_token_id=0,
        router={"vocab_size": 61, "width": 16, "layers": 1, "heads": 2, "table": 500},
    )  # fmt: skip
    made = OryxForCausalLM(config).eval()
    made.model.mode_router.count(texts(50, 30))
    torch.nn.init.normal_(made.model.mode_router.score.weight)
    for parameter in made.model.parameters():
        parameter.data.mul_(3.0) if parameter.ndim > 1 else None  # so that a mode makes a difference
    torch.nn.init.zeros_(made.model.mode_router.features.weight)  # greedy text repeats itself: it would always attend
    made.model.mode_router.calibrate(made.model.mode_router(texts(64, 30))[0])
    return made


def texts(rows: int, length: int) -> Tensor:
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def test_one_pass_is_the_plan_of_its_mask(model: OryxForCausalLM) -> None:
    tokens = texts(3, 37)
    mask = model.model.route(0.4, tokens)
    assert 0.2 < mask.float().mean() < 0.6
    assert len({tuple(row) for row in mask.tolist()}) == 3  # every row has its own plan
    routed, masked = (model(tokens, mode_plan=plan).logits for plan in (PLAN, mask))
    assert torch.equal(routed, masked)
    assert not torch.allclose(routed, model(tokens, mode_plan="attention").logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_in_parts_over_caches(model: OryxForCausalLM, static: bool) -> None:
    tokens = texts(2, 30)
    whole = model(tokens, mode_plan=PLAN, use_cache=False).logits
    cache = OryxCache(model.config, 40 if static else None)
    parts = [model(part, mode_plan=PLAN, past_key_values=cache).logits for part in tokens.split([11, 1, 1, 16, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_follows_the_router(model: OryxForCausalLM) -> None:
    """Sampled, so that both modes occur while decoding: logits as of one pass, and one text over every cache."""
    prompt, texts_found = texts(2, 13), []
    settings = {"mode_plan": PLAN, "max_new_tokens": 24, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(3)
    out = model.generate(prompt, **settings, return_dict_in_generate=True, output_logits=True)
    whole = model(out.sequences, mode_plan=PLAN, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 12:-1], rtol=1e-4, atol=1e-4)
    attends = model.model.route(0.4, out.sequences)[:, 13:-1]
    assert {tuple(column) for column in attends.T.tolist()} >= {(True, False), (False, True)}
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        torch.manual_seed(3)
        texts_found.append(model.generate(prompt, **settings, **options).tolist())
    assert texts_found == [out.sequences.tolist()] * 2


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_a_padded_batch_is_its_rows(model: OryxForCausalLM, options: dict) -> None:
    rows = [texts(1, 9), texts(1, 14)]
    settings = {"mode_plan": PLAN, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(row, **settings, **options)[0, row.shape[1] :].tolist() for row in rows]
    padded = torch.cat([torch.nn.functional.pad(row, (14 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * 5 + [1] * 9, [1] * 14])
    together = model.generate(padded, attention_mask=mask, **settings, **options)[:, 14:].tolist()
    assert together == alone


@torch.no_grad()
def test_packed_documents_are_texts_of_their_own(model: OryxForCausalLM) -> None:
    tokens = texts(1, 24)
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    packed = model(tokens, position_ids=positions, mode_plan=PLAN, use_cache=False).logits
    apart = [model(part, mode_plan=PLAN, use_cache=False).logits for part in tokens.split([10, 14], 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_as_default_plan(model: OryxForCausalLM) -> None:
    tokens = texts(2, 20)
    expected = model(tokens, mode_plan=PLAN).logits
    try:
        model.config.mode_plan = PLAN
        assert torch.equal(model(tokens).logits, expected)
    finally:
        model.config.mode_plan = None


@torch.no_grad()
def test_a_router_plan_without_what_it_needs_is_refused(model: OryxForCausalLM) -> None:
    tokens = texts(1, 8)
    without = OryxForCausalLM(OryxConfig(**{**model.config.to_dict(), "router": None}))
    with pytest.raises(ValueError, match=r"mode plan `router:0\.4`: this model has no router; train one"):
        without(tokens, mode_plan=PLAN)
    with pytest.raises(ValueError, match=r"mode plan `router:0\.4`: this model has no router"):
        without.generate(tokens, mode_plan=PLAN, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"mode plan `router:0\.1`: this model has no router"):
        OryxForCausalLM(OryxConfig(**{**model.config.to_dict(), "router": None, "mode_plan": "router:0.1"}))
    with pytest.raises(ValueError, match="`2` is not a number from 0 to 1"):
        model(tokens, mode_plan="router:2")
    with pytest.raises(ValueError, match=r"keep_kv=False with the mode plan `router:0\.4`: a router may let any new"):
        model.generate(tokens, mode_plan=PLAN, keep_kv=False, max_new_tokens=2)
    with pytest.raises(ValueError, match="a router reads input_ids, and inputs_embeds were given"):
        model(inputs_embeds=model.model.embed_tokens(tokens), mode_plan=PLAN)
    cache = OryxCache(model.config)
    model(tokens, mode_plan="recurrent", past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds tokens read under another plan"):
        model(tokens, mode_plan=PLAN, past_key_values=cache)
    with pytest.raises(ValueError, match="router: expected whole numbers heads, layers, table, vocab_size, width"):
        OryxForCausalLM(OryxConfig(**{**model.config.to_dict(), "router": {"width": 3}}))
