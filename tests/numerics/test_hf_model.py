"""The Hugging Face model against a model written out token by token, and against itself in every way of calling it."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_reference import random_ids, random_modes, reference_logits, tiny_config, tiny_model

from oryx_megatron.hf.modeling_oryx import OryxCache, OryxForCausalLM

MIXERS = ("gdn", "mamba2")
TOLERANCE = {"atol": 1e-9, "rtol": 0}  # the models are fp64


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv_width": 0, "output_gate": False, "qk_norm": False},
        {"shared_query": True, "rotary": "both"},
        {"rotary": "none", "num_key_value_heads": 4, "tie_word_embeddings": False, "final_logit_softcapping": 0.5},
        {"modes": "attention"},
        {"modes": "recurrent", "conv_width": 2},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "default",
)
def test_equals_the_written_out_model(mixer: str, changes: dict) -> None:
    model = tiny_model(mixer, **changes)
    for s in (1, 8, 21):
        ids, attends = random_ids(s), random_modes(s)
        if model.config.modes != "both":
            attends[:] = model.config.modes == "attention"
        with torch.no_grad():
            logits = model(ids[None], mode_plan=attends).logits[0]
        torch.testing.assert_close(logits, reference_logits(model, ids, attends.tolist()), **TOLERANCE)


EXTREMES = {"decay 0": (60.0, 20.0), "decay 1": (-60.0, 0.0), "decay 0 and 1 in turn": (None, 7.0)}
"""Logits of the decays (None: 60 and -12 in turn) and a_log."""


def extreme_model(mixer: str, case: str) -> OryxForCausalLM:
    """One fp32 layer whose decays are what `case` says: its decay logits are a token's own, read off the embedding."""
    model = tiny_model(mixer, dtype=torch.float32, num_hidden_layers=1, recurrence_chunk=64, conv_width=0)
    gate, a_log = EXTREMES[case]
    core = model.model.layers[0].mixer
    with torch.no_grad():
        core.a_log.fill_(a_log)
        core.dt_bias.zero_()
        # A constant direction of the input, and one whose sign is the token's parity.
        model.model.layers[0].input_layernorm.weight.fill_(1.0)
        table = model.model.embed_tokens.weight
        table[:, 0] = 1.0
        table[:, 1] = torch.where(torch.arange(61) % 2 == 0, 1.0, -1.0)
        logits = core.decay_proj.weight
        heads = core.config.num_attention_heads
        logits[:heads].zero_()
        scale = (table.double().square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt().mean().item()
        high, low = (60.0, -12.0) if gate is None else (gate, gate)
        logits[:heads, 0] = (high + low) / 2 * scale
        logits[:heads, 1] = (high - low) / 2 * scale
    return model


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("case", EXTREMES)
def test_fp32_at_extreme_gates_equals_fp64_token_by_token(mixer: str, case: str) -> None:
    """Whole model, one pass and token by token: weak decays after strong ones do not drown in their sum."""
    model, ids = extreme_model(mixer, case), random_ids(100)
    want = reference_logits(model, ids, [False] * 100)
    cache = OryxCache(model.config)
    with torch.no_grad():
        once = model(ids[None], mode_plan="recurrent").logits[0]
        steps = [model(token[None], past_key_values=cache, mode_plan="recurrent").logits[0] for token in ids.split(1)]
    for got in (once, torch.cat(steps)):
        assert (got.double() - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("mixer", MIXERS)
def test_state_alone_is_the_state_of_outputs(mixer: str) -> None:
    """Where no token reads the recurrence the outputs are left out: the state is the same bits."""
    model, ids = tiny_model(mixer), random_ids(2, 33)
    states = []
    for plan in ("attention", "last:1"):
        cache = OryxCache(model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache, mode_plan=plan)
        states.append(cache.layers[0].recurrent)
    assert torch.equal(*states)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_token_by_token_equals_one_pass(mixer: str, form: str) -> None:
    """fp32, random plans, in single tokens and in pieces."""
    model = tiny_model(mixer, dtype=torch.float32)
    ids, modes = random_ids(3, 23), random_modes(23)
    with torch.no_grad():
        whole = model(ids, mode_plan=modes).logits
        for sizes in ([1] * 23, [5, 1, 9, 1, 7], [22, 1]):
            cache = OryxCache(model.config, max_cache_len=40 if form == "static" else None)
            parts, end = [], 0
            for size in sizes:
                piece = slice(end, end + size)
                out = model(ids[:, piece], past_key_values=cache, use_cache=True, mode_plan=modes[piece])
                parts.append(out.logits)
                end += size
                assert int(cache.get_seq_length()) == end
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_plan_is_causal(mixer: str) -> None:
    model = tiny_model(mixer)
    ids, modes = random_ids(1, 20), random_modes(20)
    other = torch.cat([modes[:11], ~modes[11:]])
    with torch.no_grad():
        one, two = (model(ids, mode_plan=plan).logits for plan in (modes, other))
    torch.testing.assert_close(one[:, :11], two[:, :11], atol=1e-12, rtol=0)
    assert (one[:, 11:] - two[:, 11:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_enters_nothing(mixer: str, side: str) -> None:
    """A padded batch gives every row what it gives alone, also in what is decoded after it."""
    model = tiny_model(mixer)
    lengths, width = (9, 4, 1, 13), 13
    texts = [random_ids(n, seed=n) for n in lengths]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 61, (4, width), generator=generator)
    mask = torch.zeros(4, width, dtype=torch.long)
    for row, text in enumerate(texts):
        n = len(text)
        places = {"left": range(width - n, width), "right": range(n)}.get(side)
        places = sorted(torch.randperm(width, generator=generator)[:n].tolist()) if places is None else places
        ids[row, list(places)] = text
        mask[row, list(places)] = 1
    # A plan by real position is another plan by column in every row.
    plan = lambda position: position % 3 == 1  # noqa: E731
    extra = random_ids(4, 3, seed=9)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, mode_plan=plan, use_cache=True)
        longer = torch.cat([mask, torch.ones(4, 3, dtype=torch.long)], 1)
        after = model(extra, attention_mask=longer, past_key_values=out.past_key_values, mode_plan=plan).logits
        for row, text in enumerate(texts):
            alone = model(torch.cat([text, extra[row]])[None], mode_plan=plan).logits[0]
            torch.testing.assert_close(out.logits[row][mask[row] == 1], alone[: len(text)], **TOLERANCE)
            torch.testing.assert_close(after[row], alone[len(text) :], **TOLERANCE)


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_in_single_steps_and_static_caches(mixer: str) -> None:
    """Rows that start at different steps: the tokens before their start are padding."""
    model = tiny_model(mixer)
    ids = random_ids(2, 8)
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = model(ids[1:, 3:], mode_plan="recurrent").logits
        for room in (None, 12):
            cache = OryxCache(model.config, max_cache_len=room)
            for t in range(8):
                out = model(
                    ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, mode_plan="recurrent"
                ).logits
                if t >= 3:
                    torch.testing.assert_close(out[1, 0], alone[0, t - 3], **TOLERANCE)


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_documents_are_kept_apart(mixer: str) -> None:
    model = tiny_model(mixer)
    lengths, ids, modes = (5, 1, 7), random_ids(1, 13), random_modes(13)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, mode_plan=modes).logits
        parts = [model(text, mode_plan=plan).logits for text, plan in zip(ids.split(lengths, 1), modes.split(lengths))]
    torch.testing.assert_close(packed, torch.cat(parts, 1), **TOLERANCE)


def test_packed_documents_never_mix_in_a_compiled_or_exported_model() -> None:
    """Compiled they are kept apart as in eager mode; one graph without a branch refuses them, and says so."""
    model, ids = tiny_model("gdn"), random_ids(1, 13)
    packed = torch.cat([torch.arange(n) for n in (5, 3, 5)])[None]
    alone = [model(part).logits for part in ids.split([5, 3, 5], 1)]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, position_ids=packed).logits, torch.cat(alone, 1), **TOLERANCE)
    torch.testing.assert_close(compiled(ids, position_ids=torch.arange(13)[None]).logits, model(ids).logits)
    with pytest.raises(torch._dynamo.exc.UserError):
        torch.compile(model, backend="eager", fullgraph=True)(ids, position_ids=packed, use_cache=False)
    torch.compiler.reset()
    exported = torch.export.export(
        model, (ids,), {"position_ids": torch.arange(13)[None], "use_cache": False}, strict=False
    ).module()
    given = {"use_cache": False}
    torch.testing.assert_close(exported(ids, position_ids=torch.arange(13)[None], **given).logits, model(ids).logits)
    with pytest.raises(RuntimeError, match="takes no packed documents"):
        exported(ids, position_ids=packed, **given)


def test_attention_implementations_agree() -> None:
    ids, modes = random_ids(2, 19), random_modes(19)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :5] = 0
    logits = []
    for name in ("eager", "sdpa"):
        model = tiny_model("gdn", attn_implementation=name)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask, mode_plan=modes).logits[mask == 1])
    torch.testing.assert_close(*logits, **TOLERANCE)


def test_attentions_and_hidden_states() -> None:
    model = tiny_model("gdn", attn_implementation="eager")
    ids, modes = random_ids(2, 7), random_modes(7)
    with torch.no_grad():
        out = model(ids, mode_plan=modes, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2
    assert len(out.hidden_states) == 3
    sums = out.attentions[1].sum(-1)  # rows of recurrent tokens are zero
    torch.testing.assert_close(sums, modes.double().expand(2, 4, 7))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_batch_changes_of_the_cache(form: str) -> None:
    """Reordered, selected and repeated rows continue as if they had always stood there."""
    model = tiny_model("gdn")
    ids, modes = random_ids(3, 6), random_modes(6)
    nexts = random_ids(6, 1, seed=5)

    def after(change, rows: list[int]) -> None:
        cache = OryxCache(model.config, max_cache_len=9 if form == "static" else None)
        model(ids, past_key_values=cache, mode_plan=modes)
        change(cache)
        for plan in ("attention", "recurrent"):
            out = model(nexts[: len(rows)], past_key_values=copy.deepcopy(cache), mode_plan=plan).logits[:, 0]
            for i, row in enumerate(rows):
                text = torch.cat([ids[row], nexts[i]])[None]
                alone = model(text, mode_plan=[*modes.tolist(), plan == "attention"]).logits[0, -1]
                torch.testing.assert_close(out[i], alone, **TOLERANCE)

    with torch.no_grad():
        after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])
        if form == "dynamic":
            after(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
            after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_crop(form: str) -> None:
    room = 9 if form == "static" else None
    ids = random_ids(1, 6)
    model = tiny_model("gdn")
    cache = OryxCache(model.config, room)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        cache.crop(0)
        assert int(cache.get_seq_length()) == 6
        with pytest.raises(ValueError, match="2 of 6 tokens cannot be taken back out of a recurrent state"):
            cache.crop(-2)
        with pytest.raises(ValueError, match="0 to -6"):
            cache.crop(-7)
        cache.crop(-6)  # all of them: a fresh cache
        assert int(cache.get_seq_length()) == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, first)
        # Without recurrence and convolution there is nothing that cannot be wound back.
        plain = tiny_model("gdn", modes="attention", conv_width=0)
        cache = OryxCache(plain.config, room)
        plain(ids, past_key_values=cache)
        cache.crop(-2)
        again = plain(ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(again, plain(ids).logits[:, 4:], **TOLERANCE)


def test_constant_memory_without_keys_and_values() -> None:
    model = tiny_model("mamba2")
    ids = random_ids(2, 12)
    with torch.no_grad():
        whole = model(ids, mode_plan="recurrent").logits
        for room in (None, 3):  # a static cache needs no room for keys
            cache = OryxCache(model.config, room, keep_kv=False)
            parts = [
                model(piece, past_key_values=cache, mode_plan="recurrent").logits for piece in ids.split([5, 1, 6], 1)
            ]
            torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)
            assert int(cache.get_seq_length()) == 12
            assert cache.layers[0].keys is None
            with pytest.raises(ValueError, match="keep_kv=False"):
                model(ids[:, :1], past_key_values=cache, mode_plan="attention")
        # The first call holds all its keys itself: a prompt may attend and then be forgotten but for the state.
        cache = OryxCache(model.config, keep_kv=False)
        model(ids[:, :8], past_key_values=cache, mode_plan="attention")
        out = model(ids[:, 8:], past_key_values=cache, mode_plan="recurrent").logits
        torch.testing.assert_close(out, model(ids, mode_plan="prefix:8").logits[:, 8:], **TOLERANCE)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("plan", ["attention", "recurrent", "every:2"])
def test_training_reaches_every_parameter(mixer: str, plan: str) -> None:
    model = tiny_model(mixer, dtype=torch.float32).train()
    ids = random_ids(2, 14)
    out = model(ids, labels=ids, mode_plan=plan)
    assert out.past_key_values is None
    logits = out.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, mode_plan=plan, use_cache=True).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_few_steps_of_training_lower_the_loss() -> None:
    model = tiny_model("gdn", dtype=torch.float32, initializer_range=0.1).train()
    ids = random_ids(4, 24)
    labels = ids.masked_fill(torch.arange(24) < 2, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        plan = ("attention", "recurrent", "ratio:0.5")[step % 3]
        loss = model(ids, labels=labels, mode_plan=plan).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_initialisation() -> None:
    config = tiny_config(
        "mamba2", hidden_size=64, num_attention_heads=64, num_key_value_heads=64, initializer_range=0.02
    )
    torch.manual_seed(0)
    model = OryxForCausalLM(config)
    mixer = model.model.layers[0].mixer
    rate, step = mixer.a_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 4 < 12 < rate.max() <= 16
    assert 1e-3 <= step.min() < 3e-3 < 0.03 < step.max() <= 0.1
    assert (mixer.d_skip == 1).all()
    assert abs(mixer.k_proj.weight.std() / 0.02 - 1) < 0.05
    for small in (mixer.out_proj, model.model.layers[0].mlp.down_proj):
        assert abs(small.weight.std() / 0.01 - 1) < 0.05  # / sqrt(2 × 2 layers)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: m(), "exactly one of input_ids"),
        (lambda m, ids: m(ids[:, :0]), "text is empty"),
        (lambda m, ids: m(ids, mode_plan="prefix:99"), "99 tokens are more than the 6"),
        (lambda m, ids: m(ids, mode_plan="runs:a0-9"), "its runs end at 9, the text at 6"),
        (lambda m, ids: m(ids, mode_plan=[True]), "shape \\[1\\] does not fit 6 tokens"),
        (lambda m, ids: m(ids, attention_mask=torch.ones(2, 5)), "covers 5 tokens, not 0 cached ones and 6 new"),
        (lambda m, ids: m(ids, attention_mask=torch.ones(2, 1, 6, 6)), "attention_mask of shape"),
        (lambda m, ids: m(ids, past_key_values=__import__("transformers").DynamicCache()), "OryxCache"),
        (lambda m, ids: m(ids, past_key_values=OryxCache(m.config, 4)), "room for 4 tokens, not for 0 \\+ 6"),
    ],
)
def test_bad_calls_get_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        call(tiny_model("gdn"), random_ids(2, 6))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("base", [True, False])
def test_no_argument_is_dropped_in_silence(base: bool) -> None:
    whole, ids = tiny_model("gdn"), random_ids(1, 6)
    model = whole.model if base else whole
    for wrong in ({"past_key_value": None, "kache": 1}, {"mode_paln": "recurrent"}, {"encoder_outputs": ids}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{list(wrong)[-1]}'"):
            model(ids, **wrong)
    for wrong in ({"is_causal": False}, {"output_router_logits": True}):
        with pytest.raises(ValueError, match="cannot do"):
            model(ids, **wrong)
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 3, "max_length_k": 3}
    packed["seq_idx"] = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    for more in ({}, {"position_ids": torch.arange(3).repeat(2)[None], "attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="marked by position_ids that restart"):
            model(ids, **packed, **more)
    plain = {"token_type_ids": torch.zeros_like(ids), "is_causal": True, "output_hidden_states": True}
    out = model(ids, position_ids=torch.arange(3).repeat(2)[None], **packed)
    assert len(model(ids, **plain).hidden_states) == 3
    pieces = torch.cat([model(ids[:, :3])[0], model(ids[:, 3:])[0]], 1)
    torch.testing.assert_close(out[0], pieces)


def test_the_loss_takes_transformers_arguments() -> None:
    model, ids = tiny_model("mamba2"), random_ids(2, 6)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(20)).loss * 2, mean)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-7)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted, ignore_index=-7).loss, mean)
    torch.testing.assert_close(model(ids, shift_labels=shifted, ignore_index=-7).loss, mean)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names(name: str) -> None:
    model, ids = tiny_model("gdn"), random_ids(1, 7)
    cache = OryxCache(model.config)
    model(ids[:, :4], **{name: cache})
    out = model(ids[:, 4:], **{name: cache})
    torch.testing.assert_close(out.logits, model(ids).logits[:, 4:])
    assert out.past_key_values is cache
    other = "cache" if name == "past_key_values" else "past_key_values"
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids[:, :1], **{name: cache, other: OryxCache(model.config)})


def test_baselines_refuse_the_other_mode() -> None:
    with pytest.raises(ValueError, match="recurrent mode only"):
        tiny_model("gdn", modes="recurrent")(random_ids(1, 3), mode_plan="attention")
    with pytest.raises(ValueError, match="attention mode only"):
        tiny_model("gdn", modes="attention")(random_ids(1, 3), mode_plan="prefix:1")
