"""What transformers' users do with any of its models, done with Oryx: the same right values as elsewhere.

`make hf-suite` runs transformers' own tests of this kind; these are the ones it lacks, or that need no download.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hf_reference import random_ids, tiny_config, tiny_model
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, DynamicCache, StaticCache
from transformers.utils import logging

from oryx_megatron.hf import layers_oryx, modeling_oryx
from oryx_megatron.hf.generation_oryx import CACHE
from oryx_megatron.hf.modeling_oryx import OryxCache, OryxForCausalLM, plan_mask
from oryx_megatron.hf.modes_oryx import TokenModes

MIXERS = ("gdn", "mamba2")
PLANS = ("attention", "recurrent", "every:2")


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
    attends = plan_mask(plan, 9, chunk=model.config.mode_chunk)
    assert not weights.grad[:, :, ~attends].any()  # nobody reads them
    if not attends.any():
        return
    direction = torch.randn(weights.shape, dtype=weights.dtype, generator=torch.Generator().manual_seed(3)).tril()
    eager = layers_oryx.eager_attention_forward

    def moved(step: float) -> float:
        runs = iter(TokenModes.from_mask(attends[None], ids.device).runs)

        def forward(module, query, key, value, mask, **kwargs):
            _, w = eager(module, query, key, value, mask, **kwargs)
            if module is model.model.layers[0].mixer:
                start, stop = next(runs)
                w = w + step * direction[:, :, start:stop, : w.shape[-1]]
            return (w @ value.repeat_interleave(2, 1)).transpose(1, 2), w

        monkeypatch.setattr(layers_oryx, "eager_attention_forward", forward)
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


def test_a_compiled_step_is_one_graph_and_is_compiled_once() -> None:
    """As Llama's: nothing on the way of a step makes torch.compile stop and begin again, asked for or not."""
    model = tiny_model("gdn", dtype=torch.float32)
    torch.compiler.reset()
    counters.clear()
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled, "return_dict_in_generate": True}
    for new in (20, 5, 12):
        model.generate(random_ids(1, 4), max_new_tokens=new, **options)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_caches_made_by_transformers(mixer: str, form: str) -> None:
    """An empty DynamicCache or StaticCache of the model's config is as good as an OryxCache, and is one afterwards."""
    model = tiny_model(mixer, dtype=torch.float32, mode_plan="prompt:every:2,new:recurrent")
    ids, room = random_ids(2, 6), 20 if form == "static" else None

    def theirs() -> Cache:
        if room is None:
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=room)

    options = {"max_new_tokens": 5, "do_sample": False}
    ours, used = OryxCache(model.config, room), theirs()
    assert isinstance(ours, DynamicCache if room is None else StaticCache)
    want = model.generate(ids, past_key_values=ours, **options)
    assert torch.equal(model.generate(ids, past_key_values=used, **options), want)
    assert type(used) is type(ours)
    assert int(used.get_seq_length()) == int(ours.get_seq_length())
    used = theirs()
    with torch.no_grad():
        pieces = [model(part, past_key_values=used, mode_plan="recurrent").logits for part in (ids[:, :4], ids[:, 4:])]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids, mode_plan="recurrent").logits, atol=1e-4, rtol=0)
    copied = copy.deepcopy(used)
    assert type(copied) is type(used)
    assert copied.layers[0].recurrent is not used.layers[0].recurrent


def test_caches_of_other_content_are_refused() -> None:
    model, ids = tiny_model("gdn", dtype=torch.float32), random_ids(1, 3)
    filled = DynamicCache(config=model.config)
    filled.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 6), 0)
    for cache, message in (
        (filled, "prefix tuning does not"),
        (DynamicCache(), "its own OryxCache"),
        (DynamicCache(config=tiny_config("gdn", num_hidden_layers=5)), "its own OryxCache"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            model(ids, past_key_values=cache)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("plan", ["attention", "every:2", "prompt:prefix:5,new:recurrent"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_tuning(mixer: str, plan: str, use_cache: bool) -> None:
    """PEFT's virtual tokens are read, and counted by the plan, as tokens before the text."""
    model = tiny_model(mixer, dtype=torch.float32, mode_plan=plan)
    virtual, new = 3, 4
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    tuned = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        tuned.prompt_encoder.default.embedding.weight.normal_(generator=torch.Generator().manual_seed(5))
    ids = random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"max_new_tokens": new, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    if use_cache and CACHE == "cache":  # PEFT does not know that name, and adds its tokens at every step
        with pytest.raises(ValueError, match="attention_mask covers 10 tokens, not 9 cached ones and 4 new ones"):
            tuned.generate(input_ids=ids, attention_mask=mask, **options)
        return
    out = tuned.generate(input_ids=ids, attention_mask=mask, **options)
    for row, pads in enumerate((0, 2)):
        text = out.sequences[row, pads:]
        prompt = virtual + 6 - pads
        embeddings = torch.cat([tuned.get_prompt(1), model.get_input_embeddings()(text[None])], 1)
        modes = plan_mask(plan, prompt + new, chunk=model.config.mode_chunk, prompt=prompt)
        with torch.no_grad():
            logits = model(inputs_embeds=embeddings, mode_plan=modes).logits[0, prompt - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], logits, atol=1e-4, rtol=0)
    tuned.train()
    tuned(ids, attention_mask=mask, labels=ids).loss.backward()
    assert tuned.prompt_encoder.default.embedding.weight.grad.abs().min() > 0


def test_prefix_tuning_is_refused() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(tiny_model("gdn", dtype=torch.float32, hidden_size=32), config)
    ids = random_ids(1, 4)
    for call in (tuned, lambda ids: tuned.generate(input_ids=ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"prefix tuning does not|two names of one argument") as refused:
            call(ids)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("plan", [None, "recurrent", "prompt:attention,new:recurrent"])
def test_torch_export_under_the_default_plan(mixer: str, plan: str | None) -> None:
    model = tiny_model(mixer, dtype=torch.float32, mode_plan=plan)
    inputs = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    program = torch.export.export(model, (), {**inputs, "use_cache": False})
    others = {"input_ids": random_ids(2, 9, seed=4), "attention_mask": inputs["attention_mask"].clone()}
    others["attention_mask"][0, :3] = 0
    with torch.no_grad():
        found = program.module()(**others, use_cache=False).logits
        want = model(**others, use_cache=False).logits
    valid = others["attention_mask"].bool()
    torch.testing.assert_close(found[valid], want[valid], atol=1e-4, rtol=0)


def test_torch_export_of_any_length() -> None:
    lengths = {"input_ids": {1: torch.export.Dim("s", min=2, max=64)}, "use_cache": None}
    inputs = {"input_ids": random_ids(2, 9), "use_cache": False}
    model = tiny_model("gdn", dtype=torch.float32)
    program = torch.export.export(model, (), inputs, dynamic_shapes=lengths)
    ids = random_ids(2, 21)
    with torch.no_grad():
        found = program.module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=0)
    for refusing, message in (
        (tiny_model("gdn", mode_plan="recurrent"), "torch.export with a dynamic length: the recurrence loops"),
        (tiny_model("gdn", mode_plan="every:2"), "mode plan `every:2` under torch.export"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            torch.export.export(refusing, (), inputs, dynamic_shapes=lengths)
        assert "\n" not in str(refused.value)
