"""Self-speculative decoding: the text and the states of plain greedy decoding, whatever the heads draft."""

from __future__ import annotations

import itertools

import pytest
import torch
from hf_reference import tiny_model

from oryx_megatron.hf.modeling_oryx import OryxForCausalLM

MIXERS = ("gdn", "mamba2")
PLANS = (
    *("attention", "recurrent", "ratio:0.5", "last:9", "prompt:attention,new:recurrent", "runs:a0-9,r9-15,a15-end"),
    *("layers:0=attention,rest=ratio:0.5", "layers:0=ratio:0.5,rest=prompt:attention,new:recurrent"),
)
VOCABULARY = 13
KINDS = {
    "one head": {"num_nextn_predict_layers": 1},
    "three heads": {"num_nextn_predict_layers": 3},
    "two heads, grouped, rotary both": {"num_nextn_predict_layers": 2, "num_key_value_heads": 1, "rotary": "both"},
    "no convolution": {"num_nextn_predict_layers": 1, "conv_width": 0, "final_logit_softcapping": 2.0},
    "hybrid": {"num_nextn_predict_layers": 2, "layer_modes": ["recurrent", "attention"]},
    "recurrent heads": {"num_nextn_predict_layers": 2, "layer_modes": ["both", "recurrent"]},
}


def drafting_model(mixer: str, agreeing: float = 0.1, seed: int = 0, **changes) -> OryxForCausalLM:
    """Heads that guess well: all but what mixers and MLPs write, which is `agreeing` times as small, is the embedding.

    A head that passes on the embedding of the token further on predicts what the model will there.
    """
    model = tiny_model(mixer, seed=seed, vocab_size=VOCABULARY, **changes)
    d = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                parameter.mul_(agreeing)
            elif name.endswith("eh_proj.weight"):
                parameter.copy_(torch.eye(d, 2 * d))
            elif "norm" in name and ("mtp" in name or name == "model.norm.weight"):
                parameter.fill_(1.0)
    return model


def prompt_of(length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: OryxForCausalLM, length: int, plan: str, **more):
    common = {"max_new_tokens": 26, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    return model.generate(**prompt_of(length), mode_plan=plan, **(common | more))


def assert_same_states(one, two) -> None:
    """Of two caches: keys, values, windows and recurrent states of every layer, by rounding."""
    assert one.get_seq_length() == two.get_seq_length()
    for first, second in zip(one.layers, two.layers, strict=True):
        assert first.keep_kv == second.keep_kv
        pairs = [(first.window, second.window), (first.recurrent, second.recurrent)]
        pairs += [(first.keys, second.keys), (first.values, second.values)] if first.keep_kv else []
        for a, b in pairs:
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_text_and_states_are_those_of_plain_decoding(mixer: str, changes: dict) -> None:
    """fp64; drafts that are wrong, partly right, and more than there are heads; prompts as short as a token."""
    heads, accepted, rejected = changes["num_nextn_predict_layers"], 0, 0
    model = drafting_model(mixer, 0.4, **changes)
    for plan, length in zip(PLANS, itertools.cycle((11, 1, 2))):
        plain = generate(model, length, plan)
        for count in dict.fromkeys((True, 1, heads + 2)):
            found = generate(model, length, plan, speculative=count)
            assert found.sequences.tolist() == plain.sequences.tolist(), (plan, length, count)
            assert_same_states(found.past_key_values, plain.past_key_values)
            done = found.speculation
            assert done.tokens == 25  # the first comes from the prompt's pass
            assert done.tokens == done.passes + done.accepted
            accepted, rejected = accepted + done.accepted, rejected + done.drafted - done.accepted
    assert accepted > 0
    assert rejected > 0


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("heads", [1, 3])
def test_perfect_drafts_are_all_accepted(mixer: str, heads: int) -> None:
    """A model of the last token alone, whose heads know it: as many tokens a pass as are drafted, and one."""
    model = drafting_model(mixer, 0.0, num_nextn_predict_layers=heads)
    for plan in ("attention", "recurrent"):
        found = generate(model, 5, plan, speculative=True, max_new_tokens=1 + 4 * (heads + 1)).speculation
        assert found.acceptance == 1.0
        assert found.tokens_per_pass == heads + 1
        assert found.passes == 4


@pytest.mark.parametrize("mixer", MIXERS)
def test_ends_and_processors_as_in_plain_decoding(mixer: str) -> None:
    """End of text inside a draft, processors that read the text, streamers, scores, and no keys and values."""
    model = drafting_model(mixer, 0.3, num_nextn_predict_layers=2)
    first = generate(model, 7, "ratio:0.5").sequences[0, 7:].tolist()
    for end in dict.fromkeys(first):
        plain, found = (generate(model, 7, "ratio:0.5", eos_token_id=end, speculative=n) for n in (None, 3))
        assert found.sequences.tolist() == plain.sequences.tolist()
        assert found.sequences[0, -1] == end
        assert_same_states(found.past_key_values, plain.past_key_values)
    more = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "output_scores": True, "output_logits": True}
    plain, found = (generate(model, 7, "recurrent", speculative=n, **more) for n in (None, 2))
    assert found.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-6, atol=1e-6)
    plan = "prompt:attention,new:recurrent"
    plain, found = (generate(model, 7, plan, speculative=n, keep_kv=False) for n in (None, 2))
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert_same_states(found.past_key_values, plain.past_key_values)

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, tokens: torch.Tensor) -> None:
            self.tokens += tokens.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    text = model.generate(**prompt_of(7), max_new_tokens=9, speculative=True, streamer=streamer, pad_token_id=0)
    assert streamer.ended
    assert streamer.tokens == text[0].tolist()
    model.generation_config.speculative = 2  # as an export's generation_config.json may have it
    assert generate(model, 7, "recurrent").speculation.drafted > 0
    assert not hasattr(generate(model, 7, "recurrent", speculative=0), "speculation")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"speculative": -1}, "speculative=-1: give True, or the number of tokens to draft in a round"),
        ({"do_sample": True}, "speculative: not with do_sample; it decodes one text greedily"),
        ({"num_beams": 2}, "speculative: not with num_beams"),
        ({"cache_implementation": "static"}, "speculative: not with cache_implementation='static'"),
        ({"use_cache": False}, "speculative: not with use_cache=False"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)},
            "several texts at once",
        ),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "speculative: not with padding"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_drafts_do_not_work_with(more: dict, message: str) -> None:
    model = drafting_model("gdn", num_nextn_predict_layers=1)
    with pytest.raises(ValueError, match=message):
        model.generate(**({**prompt_of(3), "speculative": True, "max_new_tokens": 4, "pad_token_id": 0} | more))
    with pytest.raises(ValueError, match=r"speculative: this model has no heads .*num_nextn_predict_layers is 0"):
        tiny_model("gdn").generate(**prompt_of(3), speculative=True, max_new_tokens=2)
    cache = model(prompt_of(3)["input_ids"], use_cache=True)
    with pytest.raises(ValueError, match="not with a cache of earlier tokens"):
        model.generate(
            **prompt_of(5), past_key_values=getattr(cache, "past_key_values", None) or cache.cache, speculative=1
        )


def test_gradients_reach_heads_as_zeros() -> None:
    """Data-parallel trainers of other frameworks wait for every parameter."""
    model = tiny_model("gdn", num_nextn_predict_layers=1).train()
    ids = prompt_of(9)["input_ids"]
    model(ids, labels=ids).loss.backward()
    heads = [parameter for name, parameter in model.named_parameters() if name.startswith("mtp.")]
    assert len(heads) > 10
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in heads)
