"""The router: causal, in one pass as token by token, deaf to padding; what it learns; its thresholds and file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oryx_megatron.config.schema import RouterConfig
from oryx_megatron.errors import CheckpointError, ConfigError
from oryx_megatron.eval.routed import Plans
from oryx_megatron.eval.router_training import Gains, fit
from oryx_megatron.hf.plans_oryx import routed_share
from oryx_megatron.hf.router import NAME, load_router, save_router
from oryx_megatron.hf.router_oryx import (
    COUNTED,
    FEATURES,
    GRAMS,
    PADDING,
    OryxRouter,
    RouterShape,
    RouterSteps,
    next_repetitions,
    repetitions,
)
from oryx_megatron.router import main

VOCABULARY = 97


@pytest.fixture(params=[0, 1000], ids=["", "counts"])
def made(request: pytest.FixtureRequest) -> OryxRouter:
    """Of both kinds."""
    return router(table=request.param)


def router(seed: int = 0, heads: int = 2, table: int = 1000) -> OryxRouter:
    torch.manual_seed(seed)
    made = OryxRouter(RouterShape(VOCABULARY, 32, 2, heads, table), 101).double()
    if table:
        made.count(texts(20, 200))
    torch.nn.init.normal_(made.score.weight)
    return made.eval()


def texts(rows: int = 3, length: int = 83) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cuts", [(1,) * 83, (40, 1, 1, 41), (3, 80)])
def test_in_parts_as_at_once(made: OryxRouter, cuts: tuple[int, ...]) -> None:
    tokens, state, parts = texts(), None, []
    for part in tokens.split(list(cuts), 1):
        scores, state = made(part, state)
        parts.append(scores)
    torch.testing.assert_close(torch.cat(parts, 1), made(tokens)[0], rtol=0, atol=1e-6)


def test_a_score_depends_on_the_past_alone(made: OryxRouter) -> None:
    tokens = texts()
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % VOCABULARY
    before, after = made(tokens)[0], made(changed)[0]
    assert torch.equal(before[:, :40], after[:, :40])
    assert (before[:, 40:] != after[:, 40:]).all(1).any()


@pytest.mark.parametrize("spread", [1, (1 << 20) + 7, (1 << 29) - 3])
def test_repetitions_are_counted_by_hand(spread: int) -> None:
    """Against a loop over all earlier places, with padding: at once, in parts, and place by place; any vocabulary."""
    tokens = torch.randint(5, (3, 40), generator=torch.Generator().manual_seed(3)) * spread
    tokens[0, :6] = PADDING
    expected, followed = torch.zeros(3, 40, FEATURES + COUNTED), torch.full((3, 40, GRAMS), PADDING)
    for row, text in enumerate(tokens.tolist()):
        for i, token in enumerate(text):
            if token == PADDING:
                continue
            expected[row, i, -1] = math.log1p(text[:i].count(token)) / 4
            for n in range(GRAMS):
                run = text[max(i - n, 0) : i + 1]
                if len(run) <= n or PADDING in run:
                    continue
                ends = [j for j in range(n, i) if text[j - n : j + 1] == run]
                if ends:
                    then = followed[row, i, n] = text[ends[-1] + 1]
                    age = min(i - j for j in range(i + 1) if text[j] == then)
                    often = sum(text[j : j + 2] == [token, then] for j in range(i))
                    expected[row, i, 2 * n] = 1
                    expected[row, i, 2 * n + 1] = math.log(i - ends[-1]) / 8
                    expected[row, i, FEATURES + n] = math.log1p(age) / 8
                    expected[row, i, FEATURES + GRAMS + n] = math.log1p(often) / 4
    previous = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=PADDING)
    cuts = ((0, 40),), ((0, 1), (1, 20), (20, 21), (21, 22), (22, 40))
    room = torch.cat((tokens, tokens[:, :3]), 1)
    for counts in (False, True):
        ways = [[repetitions(tokens[:, :a], tokens[:, a:b], counts) for a, b in cut] for cut in cuts]
        ways.append([])
        for i in range(40):
            written = room.clone()
            written[:, i + 1 :] = PADDING
            ways[-1].append(next_repetitions(written, torch.tensor([i]), counts))
        for way in ways:
            features, then, before = (torch.cat(part, 1) for part in zip(*way))
            there = tokens != PADDING  # of padding nothing is asked
            torch.testing.assert_close(features[there], expected[there][:, : features.shape[-1]])
            assert features.shape[-1] == FEATURES + counts * COUNTED
            assert torch.equal(then, followed)
            assert torch.equal(before, previous)


def test_no_counts_in_texts_beyond_its_keys() -> None:
    with pytest.raises(ValueError, match="below 4,194,304 tokens, and this one has 4,194,305"):
        repetitions(torch.zeros(1, 1 << 22, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), counts=True)


def test_a_large_vocabulary_counts_too() -> None:
    large = OryxRouter(RouterShape((1 << 20) + 9, 4, 1, 1, table=64)).eval()
    tokens = (1 << 20) - 40 + texts(2, 30) % 49
    large.count(tokens)
    torch.nn.init.normal_(large.score.weight)
    scores, state = large(tokens[:, :20])
    then, _ = large(tokens[:, 20:], state)
    torch.testing.assert_close(torch.cat((scores, then), 1), large(tokens)[0], rtol=0, atol=1e-5)
    assert large.singles[tokens].min() > 0


def test_the_table_knows_what_is_likely() -> None:
    """Log-probabilities of followers and of the token, as far as its entries are not shared."""
    made = OryxRouter(RouterShape(VOCABULARY, 32, 2, 2, table=1 << 18))
    training = texts(64, 500) % 7
    made.count(training)
    made.count(training[:1])
    assert made.singles.sum() == 65 * 500
    text = torch.tensor([[3, 4, 5, 3, 4]])
    found = repetitions(text[:, :0], text, True)
    features = made._expected(text, found.followed, found.previous)[0, -1] * 8
    rows = [*training.tolist(), training[0].tolist()]
    count = {run: sum(row[i : i + len(run)] == list(run) for row in rows for i in range(500))
             for run in ((3,), (4,), (3, 4), (4, 5), (3, 4, 5))}  # fmt: skip
    after_one = math.log((count[4, 5] + 0.1) / (count[4,] + 1))
    after_two = math.log((count[3, 4, 5] + 0.1) / (count[3, 4] + 1))
    own = math.log((count[3, 4] + 0.1) / (count[3,] + 1))
    expected = [after_one, after_one, 0.0, after_two, after_two, 0.0, own]
    torch.testing.assert_close(features, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert made._expected(text, found.followed, found.previous)[0, 0].count_nonzero() == 0


def test_steps_at_fixed_addresses_are_one_pass(made: OryxRouter) -> None:
    tokens = texts(3, 60)
    whole = made(tokens)[0]
    scores, state = made(tokens[:, :25])
    steps = RouterSteps(made, state, 70)
    addresses = [x.memory.data_ptr() for x in steps.layers]
    parts = [scores, *(steps.step(token).clone() for token in tokens[:, 25:50].split(1, 1))]
    assert [x.memory.data_ptr() for x in steps.layers] == addresses
    parts.append(made(tokens[:, 50:], steps.state())[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


def test_padding_leaves_no_trace(made: OryxRouter) -> None:
    """On the left, as generation pads."""
    tokens = texts()
    padded = torch.cat((torch.full((3, 7), 5), tokens), 1)
    valid = torch.arange(padded.shape[1]).expand(3, -1) >= 7
    torch.testing.assert_close(made(padded, valid=valid)[0][:, 7:], made(tokens)[0], rtol=0, atol=1e-6)
    head, state = made(padded[:, :30], valid=valid[:, :30])
    tail, _ = made(padded[:, 30:], state)
    torch.testing.assert_close(torch.cat((head, tail), 1)[:, 7:], made(tokens)[0], rtol=0, atol=1e-6)


def test_thresholds_give_the_share_that_was_asked() -> None:
    made = router()
    scores = made(texts(8, 500))[0]
    made.calibrate(scores)
    for share in (0.02, 0.1, 0.255, 0.5):
        assert (scores > made.threshold(share)).double().mean().item() == pytest.approx(share, abs=0.003)
    assert (made.threshold(0.0), made.threshold(1.0)) == (math.inf, -math.inf)


def repeats(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts [n, s] of random tokens with 20 of them from elsewhere in the text again; where those are."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, 80), generator=generator)
    again = torch.zeros_like(tokens, dtype=torch.bool)
    for row in range(rows):
        place = int(torch.randint(20, 60, (), generator=generator))
        source = int(torch.randint(0, place - 19, (), generator=generator))
        tokens[row, place : place + 20] = tokens[row, source : source + 20]
        again[row, place : place + 20] = True
    return tokens, again


def test_it_learns_where_attention_gains() -> None:
    """A token whose predecessor and self stood in the text before is found, in texts never seen."""
    tokens, again = repeats(256, 0)
    gains = torch.where(again, 3.0, -0.1) + 0.3 * torch.randn(again.shape, generator=torch.Generator().manual_seed(2))
    counted = torch.ones_like(again)
    torch.manual_seed(0)
    made = OryxRouter(RouterShape(VOCABULARY, 32, 2, 2))
    options = RouterConfig(epochs=16, batch_size=16, lr=1e-2)
    known = Gains(tokens, gains, counted, torch.zeros(2, *gains.shape), tokens)
    fit(made, known, options, torch.Generator().manual_seed(0))
    fresh, there = repeats(32, 7)
    with torch.no_grad():
        scores = made.eval()(fresh)[0]
    chosen = scores >= scores.flatten().quantile(1 - 0.2)
    assert there[chosen].double().mean() > 0.8  # by chance: 0.25


def test_a_saved_router_loads_as_it_was(tmp_path: Path) -> None:
    made = router()
    made.calibrate(torch.randn(1000))
    path = tmp_path / NAME
    save_router(made, path, {"iteration": 7})
    back, about = load_router(path)
    assert about == {"iteration": 7}
    assert all(torch.equal(a.float(), b) for a, b in zip(made.state_dict().values(), back.state_dict().values()))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"router\.safetensors: damaged router"):
        load_router(path)
    (tmp_path / "other").write_text("x")
    with pytest.raises(CheckpointError, match="damaged router"):
        load_router(tmp_path / "other")
    made, shape = router(table=0), {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouterShape, "to_dict", lambda self: shape)  # as before there was a table
        save_router(made, path, {})
    assert load_router(path)[0].shape == made.shape


def test_plans_of_texts() -> None:
    made = router()
    made.calibrate(made(texts(8, 500))[0])
    plans, (text,) = Plans(16, made), texts(1, 200)
    whole = plans.of("router:0.3", text)
    assert 0.1 < whole.attention_share < 0.5
    follow, parts = plans.follow("router:0.3"), [text[:50], *text[50:].split(1)]
    assert [bit for part in parts for bit in follow(part).is_attention()] == list(whole.is_attention())
    assert plans.of("ratio:0.5", text).attention_share == pytest.approx(0.5, abs=0.05)
    assert plans.of("router:0", text).attention_tokens == 0
    assert plans.of("router:1", text).attention_tokens == 200
    for spec in ("router", "router:", "router:1.5", "router:x", "router:nan"):
        with pytest.raises(ConfigError, match=r"is not a number from 0 to 1; a plan is one of attention"):
            plans.of(spec, text)
    with pytest.raises(ConfigError, match=r"plan router:0\.1: there is no router here; train one: oryx router RUN"):
        Plans(16).of("router:0.1", text)


@pytest.mark.parametrize(("spec", "share"), [("router:0.1", 0.1), (" router: .5 ", 0.5), ("ratio:0.1", None)])
def test_routed_share(spec: str, share: float | None) -> None:
    assert routed_share(spec) == share


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        (["--width", "33"], "--width 33 is not divisible by --heads 2; use 32 or 34"),
        (["--held-out", "0"], "--held-out: 0 should be above 0"),
        (["--lr", "nan"], "--lr: nan should be above 0 and finite"),
        (["--weight-decay", "-1"], "--weight-decay: -1.0 should not be negative"),
        (["--table", "-1"], "--table: -1 should "),
    ):
        assert main(["/nowhere", *options]) == 2
        assert f"error: {told}" in capsys.readouterr().err
