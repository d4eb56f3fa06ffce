"""generate() under mode plans: what it decodes token by token is what one forward pass over the text gives."""

from __future__ import annotations

import string

import pytest
import torch
from hf_reference import random_ids, tiny_model

from oryx_megatron.hf.modeling_oryx import OryxCache, OryxForCausalLM, plan_mask

MIXERS = ("gdn", "mamba2")
PLANS = ("attention", "recurrent", "prompt:attention,new:recurrent", "prompt:recurrent,new:attention", "ratio:0.5")


def check_against_one_pass(model: OryxForCausalLM, out, plan, prompt: int, start: int = 0) -> None:
    """The logits of every step in `out` (greedy, no early stop) equal those of one pass over each row."""
    steps = torch.stack(out.logits, 1)
    for row, text in enumerate(out.sequences):
        text = text[start:]
        mask = plan_mask(plan, len(text), chunk=model.config.mode_chunk, prompt=prompt - start)
        with torch.no_grad():
            logits = model(text[None], mode_plan=mask).logits[0]
        new = steps.shape[1]
        torch.testing.assert_close(steps[row], logits[-new - 1 : -1].float(), atol=1e-4, rtol=0)
        assert text[-new:].tolist() == logits[-new - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("plan", [*PLANS, lambda i: i % 3 == 0], ids=[*PLANS, "function"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_greedy_equals_one_pass(mixer: str, plan, options: dict) -> None:
    model = tiny_model(mixer, dtype=torch.float32)
    out = model.generate(
        random_ids(2, 11),
        max_new_tokens=9,
        mode_plan=plan,
        return_dict_in_generate=True,
        output_logits=True,
        do_sample=False,
        **options,
    )
    assert out.sequences.shape == (2, 20)
    check_against_one_pass(model, out, plan, prompt=11)
    assert int(out.past_key_values.get_seq_length()) == 19


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=str)
def test_left_padded_batch_equals_single_texts(mixer: str, options: dict) -> None:
    """Rows of different lengths, so that a plan by position gives the rows different modes in one step."""
    model = tiny_model(mixer, dtype=torch.float32)
    lengths = (10, 3, 1)
    ids = torch.full((3, 10), 7)
    mask = torch.zeros(3, 10, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, 10 - n :] = random_ids(n, seed=n)
        mask[row, 10 - n :] = 1
    for plan in PLANS:
        common = {"max_new_tokens": 6, "mode_plan": plan, "do_sample": False, "pad_token_id": 0}
        batch = model.generate(ids, attention_mask=mask, **common, **options)
        for row, n in enumerate(lengths):
            alone = model.generate(ids[row : row + 1, 10 - n :], **common)
            assert batch[row, 10:].tolist() == alone[0, n:].tolist(), plan


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_follow_their_own_states(mixer: str, cache: str) -> None:
    """The score of the best beam is the log-probability of its tokens, computed in one pass."""
    model = tiny_model(mixer, dtype=torch.float32, initializer_range=0.2)
    ids = random_ids(2, 7)
    for plan in ("recurrent", "every:2"):
        out = model.generate(
            ids,
            max_new_tokens=6,
            num_beams=4,
            mode_plan=plan,
            length_penalty=0.0,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        with torch.no_grad():
            logits = model(out.sequences, mode_plan=plan_mask(plan, 13, chunk=4)).logits.log_softmax(-1)
        scores = logits[:, 6:12].gather(2, out.sequences[:, 7:, None]).sum((1, 2))
        torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=0)


def test_sampling_is_by_seed_and_by_plan() -> None:
    model = tiny_model("gdn", dtype=torch.float32)
    texts = []
    for plan in ("attention", "attention", "recurrent"):
        torch.manual_seed(3)
        texts.append(model.generate(random_ids(2, 5), max_new_tokens=12, do_sample=True, top_k=20, mode_plan=plan))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    many = model.generate(random_ids(1, 5), max_new_tokens=3, do_sample=True, num_return_sequences=4)
    assert many.shape == (4, 8)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_constant_memory(mixer: str, cache: str) -> None:
    model = tiny_model(mixer, dtype=torch.float32)
    common = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    for plan in ("recurrent", "prompt:attention,new:recurrent"):
        kept = model.generate(random_ids(2, 9), mode_plan=plan, **common)
        out = model.generate(random_ids(2, 9), mode_plan=plan, keep_kv=False, return_dict_in_generate=True, **common)
        assert torch.equal(out.sequences, kept)
        layer = out.past_key_values.layers[0]
        assert layer.keys is None
        assert int(layer.get_seq_length()) == 16


def test_continuing_from_a_cache() -> None:
    """A second call on the whole text, or on the new tokens with the whole mask, continues where the first stopped."""
    model = tiny_model("gdn", dtype=torch.float32)
    ids = random_ids(1, 6)
    plan = lambda i: i % 3 == 0  # noqa: E731
    once = model.generate(ids, max_new_tokens=8, do_sample=False, mode_plan=plan)
    first = model.generate(ids, max_new_tokens=4, do_sample=False, mode_plan=plan, return_dict_in_generate=True)
    cache = first.past_key_values
    second = model.generate(first.sequences, past_key_values=cache, max_new_tokens=4, do_sample=False, mode_plan=plan)
    assert second.tolist() == once.tolist()
    cache = OryxCache(model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache, mode_plan=plan)
    rest = model.generate(
        ids[:, 4:],
        attention_mask=torch.ones(1, 6, dtype=torch.long),
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        mode_plan=plan,
    )
    assert rest[0, 2:].tolist() == once[0, 6:].tolist()


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("room", [None, 40])
def test_a_cache_under_either_name(name: str, room: int | None) -> None:
    model, ids = tiny_model("mamba2", dtype=torch.float32), random_ids(1, 8)
    cache = OryxCache(model.config, room)
    common = {"do_sample": False, "mode_plan": "every:2"}
    text = model.generate(ids, max_new_tokens=9, **common)
    half = model.generate(ids, max_new_tokens=4, **common, **{name: cache})
    assert int(cache.get_seq_length()) == 11
    assert model.generate(half, max_new_tokens=5, **common, **{name: cache}).tolist() == text.tolist()
    assert int(cache.get_seq_length()) == 16


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("room", [None, 64])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_kept_cache_ends_with_the_text(mixer: str, room: int | None, rows: int) -> None:
    """The next turn of a chat, after a turn that stopped at an end token, equals one pass over the whole chat."""
    model = tiny_model(mixer, dtype=torch.float32)
    ids = random_ids(rows, 6)
    free = model.generate(ids, max_new_tokens=30, do_sample=False)[:, 6:].tolist()
    ends = [next(t for i, t in enumerate(row) if i >= 3 and t not in row[:i]) for row in free]
    plan = "every:2"
    for added in (1, 3, 11, 20):
        cache = OryxCache(model.config, room)
        common = {"do_sample": False, "past_key_values": cache, "mode_plan": plan, "pad_token_id": 0}
        mask = torch.ones_like(ids)  # or generate takes every token 0 for padding
        text = model.generate(ids, attention_mask=mask, max_new_tokens=30, eos_token_id=ends, **common)
        assert int(cache.get_seq_length()) == text.shape[1] - 1
        more = torch.cat([text, random_ids(rows, added, seed=added)], 1)
        common |= {"attention_mask": torch.ones_like(more), "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(more, max_new_tokens=6, **common)
        check_against_one_pass(model, out, plan, prompt=more.shape[1])


def test_without_cache_and_from_embeddings() -> None:
    model = tiny_model("mamba2", dtype=torch.float32)
    ids = random_ids(2, 6)
    once = model.generate(ids, max_new_tokens=5, do_sample=False, mode_plan="every:2")
    slow = model.generate(ids, max_new_tokens=5, do_sample=False, mode_plan="every:2", use_cache=False)
    assert torch.equal(once, slow)
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, do_sample=False, mode_plan="every:2"
    )
    assert torch.equal(once[:, 6:], embedded)


def test_stopping_and_streaming() -> None:
    model = tiny_model("gdn", dtype=torch.float32)
    ids = random_ids(2, 6)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)
    stop = free[0, 8].item()
    model.generation_config.eos_token_id = stop
    stopped = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=60)
    first = free[0, 6:].tolist().index(stop)
    assert stopped[0, 6 : 7 + first].tolist() == free[0, 6 : 7 + first].tolist()
    assert set(stopped[0, 7 + first :].tolist()) <= {60}


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"return_dict_in_generate": False}, {"speculative": 2}],
    ids=str,
)
def test_stop_strings(options: dict) -> None:
    """transformers hands the tokenizer that they need on with the arguments of the model."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_letters + string.digits[:9]
    of_letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    of_letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_letters)
    model = tiny_model("gdn", dtype=torch.float32, num_nextn_predict_layers=1)
    common = {"max_new_tokens": 12, "do_sample": False, "mode_plan": "ratio:0.5", "pad_token_id": 0} | options
    whole = model.generate(random_ids(1, 7), **common)[0].tolist()
    at = next(i for i in range(9, 19) if whole[i] not in whole[7:i])  # it ends where the letter comes first
    stopped = model.generate(random_ids(1, 7), stop_strings=[letters[whole[at]]], tokenizer=tokenizer, **common)
    if "num_beams" in options:  # which text is the best then is another question
        assert whole[at] not in stopped[0, 7:-1].tolist()
    else:
        assert stopped[0].tolist() == whole[: at + 1]


def test_defaults_come_from_the_configs() -> None:
    model = tiny_model("gdn", dtype=torch.float32, mode_plan="recurrent")
    ids = random_ids(1, 6)
    common = {"max_new_tokens": 8, "do_sample": False}
    recurrent = model.generate(ids, mode_plan="recurrent", **common)
    attention = model.generate(ids, mode_plan="attention", **common)
    assert recurrent.tolist() != attention.tolist()
    assert model.generate(ids, **common).tolist() == recurrent.tolist()
    model.generation_config.mode_plan = "attention"
    assert model.generate(ids, **common).tolist() == attention.tolist()
    assert model.generate(ids, mode_plan="recurrent", **common).tolist() == recurrent.tolist()


def test_a_default_for_prompts_holds_outside_of_generate() -> None:
    """Training and scoring know no prompt: they follow the prompt's plan."""
    model = tiny_model("gdn", dtype=torch.float32, mode_plan="prompt:last:2,new:recurrent")
    ids = random_ids(2, 6)
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    with torch.no_grad():
        for mask in (None, padded):
            found, want = (model(ids, attention_mask=mask, mode_plan=plan).logits for plan in (None, "last:2"))
            assert torch.equal(found, want)
        with pytest.raises(ValueError, match="only generate"):
            model(ids, mode_plan="prompt:attention,new:recurrent")


@pytest.mark.parametrize("modes", ["attention", "recurrent"])
def test_baselines_generate(modes: str) -> None:
    model = tiny_model("mamba2", dtype=torch.float32, modes=modes)
    out = model.generate(
        random_ids(2, 5), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    check_against_one_pass(model, out, modes, prompt=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode_plan": "prefix:99"}, "99 tokens are more than the 8 of the text"),
        ({"mode_plan": "runs:a0-99"}, "its runs end at 99, the text at 8"),
        ({"mode_plan": "sometimes"}, "unknown form"),
        ({"mode_plan": [True] * 9}, "shape \\[9\\] does not fit a text of 8"),
        ({"mode_plan": "attention", "keep_kv": False}, "keep_kv=False with attention"),
        ({"mode_plan": "last:2", "keep_kv": False}, "keep_kv=False with attention"),
        ({"mode_plan": "prompt:attention,new:recurrent", "keep_kv": False, "prefill_chunk_size": 2}, "keep_kv=False"),
        ({"cache_implementation": "quantized"}, "`quantized`: Oryx has `dynamic` and `static`"),
        ({"mode_paln": "attention"}, "mode_paln"),
    ],
)
def test_bad_calls_get_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        tiny_model("gdn", dtype=torch.float32).generate(random_ids(1, 5), max_new_tokens=3, **options)
    assert "\n" not in str(refused.value)
