"""The Hugging Face model under plans that differ over its layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hf_reference import in_pieces, random_ids, reference_logits, tiny_model

from oryx_megatron.hf.modeling_oryx import OryxForCausalLM, check_default_plan
from oryx_megatron.modes import plan_for

PLAN = "layers:0=every:2,1=attention,rest=runs:r0-3,a3-8,r8-end"
GENERATED = "layers:even=prompt:attention,new:recurrent,odd=prompt:every:2,new:every:3"
MODELS = {
    "gdn": ("gdn", {"num_hidden_layers": 3}),
    "mamba2": ("mamba2", {"num_hidden_layers": 3}),
    "mixed gdn": ("gdn", {"num_hidden_layers": 4, "layer_modes": ["both", "recurrent", "attention", "both"]}),
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name: str, dtype: torch.dtype = torch.float64) -> OryxForCausalLM:
    mixer, changes = MODELS[name]
    return tiny_model(mixer, dtype=dtype, **changes)


def masks(model: OryxForCausalLM, spec: str, length: int, prompt: int | None = None) -> torch.Tensor:
    """[layers, 1, s] by the training side's reading of a spec; layers that read none have any."""
    config = model.config
    plan = plan_for([True] * config.num_hidden_layers, spec, length, chunk=config.mode_chunk, prompt=prompt)
    return torch.from_numpy(plan.is_attention())


@models
def test_equals_the_written_out_model(name: str) -> None:
    model, ids = model_of(name), random_ids(19)
    attends = masks(model, PLAN, 19)
    with torch.no_grad():
        logits = model(ids[None], mode_plan=PLAN).logits[0]
        by_mask = model(ids[None], mode_plan=attends).logits[0]
        plain = model(ids[None], mode_plan="every:2").logits[0]
    torch.testing.assert_close(logits, reference_logits(model, ids, attends[:, 0].tolist()), atol=1e-9, rtol=0)
    assert torch.equal(by_mask, logits)
    assert not torch.allclose(plain, logits, atol=1e-3)


def test_one_plan_everywhere_is_that_plan() -> None:
    model, ids = model_of("gdn"), random_ids(2, 19)
    with torch.no_grad():
        for spec in ("attention", "recurrent", "every:2"):
            want = model(ids, mode_plan=spec).logits
            assert torch.equal(model(ids, mode_plan=f"layers:0-end={spec}").logits, want)
            assert torch.equal(model(ids, mode_plan=f"layers:0={spec},1-2={spec}").logits, want)


@models
@pytest.mark.parametrize("room", [None, 40])
def test_pieces_equal_one_pass(name: str, room: int | None) -> None:
    model, ids = model_of(name, torch.float32), random_ids(3, 23)
    modes = masks(model, "layers:0=every:2,1=attention,rest=runs:r0-3,a3-20,r20-end", 23)
    with torch.no_grad():
        whole = model(ids, mode_plan=modes).logits
    for sizes in ([1] * 23, [5, 1, 9, 1, 7]):
        logits, _ = in_pieces(model, ids, modes, sizes, room)
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


@models
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_generate_in_a_padded_batch(name: str, options: dict) -> None:
    """Every row of the batch is the one-pass argmax of its own text, under its own plan."""
    model, ids, new = model_of(name), random_ids(3, 9), 10
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :1] = 0, 0
    text = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, mode_plan=GENERATED, pad_token_id=0, **options
    )
    for row, kept in zip(text, mask, strict=True):
        own, prompt = row[9 - int(kept.sum()) :][None], int(kept.sum())
        plan = masks(model, GENERATED, prompt + new, prompt)[:, :, :-1]
        with torch.no_grad():
            best = model(own[:, :-1], mode_plan=plan).logits.argmax(-1)
        assert torch.equal(best[:, prompt - 1 :], own[:, prompt:])


def test_packed_documents_and_padding() -> None:
    """A spec counts in every document and text; a mask goes with the tokens."""
    model, ids, bounds = model_of("gdn"), random_ids(1, 20), (0, 7, 20)
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])[None]
    spec = "layers:0=prefix:2,rest=every:2"
    with torch.no_grad():
        parts = [ids[:, a:b] for a, b in itertools.pairwise(bounds)]
        alone = [model(part, mode_plan=spec).logits for part in parts]
        packed = model(ids, position_ids=positions, mode_plan=spec).logits
        given = torch.cat([masks(model, spec, part.shape[1]) for part in parts], -1)
        by_mask = model(ids, position_ids=positions, mode_plan=given).logits
        rows = torch.zeros(2, 13, dtype=torch.long)
        rows[0, 6:], rows[1] = parts[0], parts[1]
        padded = model(rows, attention_mask=torch.tensor([[0] * 6 + [1] * 7, [1] * 13]), mode_plan=spec).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-9, rtol=0)
    torch.testing.assert_close(by_mask, packed, atol=1e-12, rtol=0)
    torch.testing.assert_close(padded[0, 6:], alone[0][0], atol=1e-9, rtol=0)
    torch.testing.assert_close(padded[1], alone[1][0], atol=1e-9, rtol=0)


def test_training_reaches_every_parameter() -> None:
    model, ids = model_of("gdn", torch.float32).train(), random_ids(2, 14)
    model(ids, labels=ids, mode_plan="layers:0=attention,1=recurrent,2=every:2").loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_keys_only_layers_that_attend_are_refused() -> None:
    model, ids = model_of("gdn"), random_ids(1, 6)
    plan = "layers:0=prompt:attention,new:{},rest=recurrent"
    with pytest.raises(ValueError, match="keep_kv=False with attention"):
        model.generate(ids, max_new_tokens=4, mode_plan=plan.format("attention"), keep_kv=False)
    fast = model.generate(ids, max_new_tokens=4, do_sample=False, mode_plan=plan.format("recurrent"), keep_kv=False)
    want = model.generate(ids, max_new_tokens=4, do_sample=False, mode_plan=plan.format("recurrent"))
    assert torch.equal(fast, want)


def test_default_plan() -> None:
    model, ids = tiny_model("gdn", mode_plan=GENERATED), random_ids(1, 9)
    with torch.no_grad():
        prompt = "layers:even=attention,odd=every:2"
        assert torch.equal(model(ids).logits, model(ids, mode_plan=prompt).logits)
    model.config.mode_plan = "layers:0=attention,1=last:3"
    with pytest.raises(ValueError, match="counts from the end of each text"):
        model(random_ids(2, 9))
    for plan, why in (
        ("layers:0=attention", "layer 1 has no plan"),
        ("layers:0-2=attention", "layer 2 of `0-2` is not there: the model has 2, 0 to 1"),
        ("layers:0=atention,1=recurrent", "mode plan `atention`: unknown form"),
        ("layers:0=router:0.1,1=recurrent", "cannot be a plan `router:`"),
    ):
        model.config.mode_plan = plan
        with pytest.raises(ValueError, match=why) as refused:
            check_default_plan(model.config)
        assert "\n" not in str(refused.value)
    single = tiny_model("gdn", modes="recurrent").config
    single.mode_plan = "layers:0=recurrent,1=attention"
    with pytest.raises(ValueError, match="recurrent mode only"):
        check_default_plan(single)
