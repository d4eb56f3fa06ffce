"""Mode plans of the stand-alone Hugging Face file: the same plans, and the same complaints, as the training side's."""

import pytest
import torch

from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.modes_oryx import TokenModes, plan_mask
from oryx_megatron.modes import Mode, parse_plan

SPECS = [
    "attention",
    "recurrent",
    "prefix:0",
    "prefix:5",
    "last:3",
    "ratio:0",
    "ratio:0.1",
    "ratio:.29",
    "ratio:1",
    "every:1",
    "every:3",
    "runs:a0-5,r5-17",
    "runs:a0%-25%,r25%-end",
    "runs:r0-33.3%,a33.3%-100%",
    "runs:a0-1%,r1%-end",
    "prompt:runs:r0-50%,a50%-end,new:runs:a0-end",
    "prompt:attention,new:recurrent",
    "prompt:every:2,new:last:4",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_specs_mean_what_they_mean_in_training(spec: str, chunk: int) -> None:
    ours = plan_mask(spec, 17, chunk=chunk, prompt=9)
    theirs = parse_plan(spec, 17, chunk=chunk, prompt=9).is_attention()
    assert ours.tolist() == theirs.tolist()


def test_ratio_over_many_chunks() -> None:
    for length in (1, 999, 1000, 4096):
        for ratio in ("0.29", "0.333", "0.9"):
            theirs = parse_plan(f"ratio:{ratio}", length, chunk=10).is_attention()
            assert plan_mask(f"ratio:{ratio}", length, chunk=10).tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "spec",
    [
        *("", "atention", "prefix:18", "prefix:x", "last:99", "ratio:1.1", "ratio:-1", "every:0"),
        *("runs:a0-5", "runs:a0-5,r6-17", "runs:b0-17", "runs:a0-18"),
        *("runs:a0-50%", "runs:a0-101%", "runs:a0-50%,r9-end", "runs:aend-end,r0-end", "runs:a0-17c"),
        *("prompt:attention", "prompt:attention,new:runs:a0-3", "prompt:prompt:a,new:b,new:c"),
    ],
)
def test_what_is_no_plan_is_refused_on_both_sides(spec: str) -> None:
    with pytest.raises(ConfigError):
        parse_plan(spec, 17, chunk=4, prompt=9)
    with pytest.raises(ValueError, match="mode plan") as refused:
        plan_mask(spec, 17, chunk=4, prompt=9)
    assert "\n" not in str(refused.value)


def test_prompt_plan_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="only generate"):
        plan_mask("prompt:attention,new:recurrent", 5, chunk=4)


def test_functions_and_masks() -> None:
    assert plan_mask(lambda i: i % 2 == 0, 4, chunk=1).tolist() == [True, False, True, False]
    assert plan_mask(lambda i: "attention" if i else "recurrent", 3, chunk=1).tolist() == [False, True, True]
    assert plan_mask([Mode.ATTENTION, Mode.RECURRENT], 2, chunk=1).tolist() == [True, False]
    assert plan_mask(torch.tensor([0, 1]), 2, chunk=1).tolist() == [False, True]
    with pytest.raises(ValueError, match="shape \\[2\\] does not fit a text of 3"):
        plan_mask([True, False], 3, chunk=1)
    with pytest.raises(ValueError, match="neither"):
        plan_mask(lambda i: "atention", 3, chunk=1)


def test_runs_are_where_some_row_attends() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 1]]).bool()
    modes = TokenModes.from_mask(mask, torch.device("cpu"))
    assert modes.runs == ((0, 2), (3, 5))
    assert modes.recurs
    assert torch.equal(modes.rows, mask)
    assert TokenModes.from_mask(mask[:1], torch.device("cpu")).rows is None
    assert TokenModes.from_mask(torch.ones(3, 4).bool(), torch.device("cpu")) == TokenModes(((0, 4),), False)
    assert TokenModes.uniform(False, 4) == TokenModes((), True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mixer", "rwkv", "mixer is 'rwkv', not one of gdn, mamba2"),
        ("modes", "none", "modes"),
        ("rotary", "all", "rotary"),
        ("num_attention_heads", 3, "not a multiple of num_key_value_heads 2"),
        ("head_dim", 7, "even width"),
        ("hidden_size", 0, "hidden_size is 0"),
        ("vocab_size", "many", "vocab_size is 'many'"),
        ("model_type", "llama", "model type `llama`"),
    ],
)
def test_config_names_the_field_at_fault(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        OryxConfig(**{"num_key_value_heads": 2, field: value})
    assert "\n" not in str(refused.value)


def test_shared_query_needs_both_modes() -> None:
    with pytest.raises(ValueError, match="shared_query"):
        OryxConfig(shared_query=True, modes="attention")
