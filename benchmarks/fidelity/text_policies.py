"""Policies that choose which tokens of real text attend, and the sets of text that they are compared on.

Shapes: n texts, s tokens of a text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from policy import seen
from torch import Tensor, nn

from oryx_megatron import platform
from oryx_megatron.data.loader import build_datasets
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.generation import LoadedModel
from oryx_megatron.eval.router_training import CLIP, losses_of, tokens_at_once
from oryx_megatron.hf.router_oryx import OryxRouter
from oryx_megatron.model import SequenceInfo
from oryx_megatron.modes import Mode, ModePlan, parse_plan

REST = "held-out"
"""The set of a run that names none."""
BEFORE = 3
"""The token and those before it that the linear model sees."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts and what the two modes make of them, all on the host; hashed by identity, for what is computed once."""

    tokens: Tensor
    """int64 [n, s]"""
    labels: Tensor
    counted: Tensor
    """bool [n, s]: whether the label counts in the loss."""
    losses: Tensor
    """float32 [2, n, s]: nats under all attention, all recurrence."""
    entropies: Tensor
    """float32 [n, s]: of the recurrent predictions, nats."""

    @property
    def gains(self) -> Tensor:
        """[n, s]: nats by which attention predicts better."""
        return self.losses[1] - self.losses[0]


Score = Callable[[Texts], Tensor]
"""[n, s]: where it is high a policy attends."""
Rule = Callable[[Texts], Tensor]
"""bool [n, s]: which tokens attend."""


class Sets:
    """Held-out sets of a run by name, its validation text for thresholds, and its training text.

    Of a run that names no sets, the one set is the validation text after that of the thresholds.
    """

    def __init__(self, model: LoadedModel, texts: int, *, training: int, held_out: int) -> None:
        self.model, run = model, model.run
        self.names = list(run.data.validation) or [REST]
        tokenizer = load_tokenizer(run.data.tokenizer)
        self.bytes = torch.from_numpy(tokenizer.token_bytes())
        asked = {"train": training, "valid": held_out} | dict.fromkeys(run.data.validation, texts)
        wanted = asked | {"valid": held_out + (0 if run.data.validation else texts)}
        sets = build_datasets(run, tokenizer, wanted, once=True)
        self.texts = {name: self._read(sets[name], 0, asked[name]) for name in sets}
        if not run.data.validation:
            self.texts[REST] = self._read(sets["valid"], held_out, texts)

    def _read(self, dataset: Any, begin: int, count: int) -> Texts:
        samples = [dataset[i] for i in range(begin, min(begin + count, len(dataset)))]
        if not samples:
            raise ConfigError(f"validation text holds {len(dataset)} texts; lower --texts or held_out={begin}")
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(sample[name]) for sample in samples])
            for name in ("tokens", "labels", "loss_mask")
        )
        tokens, labels = tokens.long(), labels.long()
        plans = [ModePlan.uniform(mode, tokens.shape[1]) for mode in (Mode.ATTENTION, Mode.RECURRENT)]
        losses = torch.stack([losses_of(self.model, tokens, labels, plan) for plan in plans])
        return Texts(tokens, labels, mask > 0, losses, self._entropies(tokens, plans[1]))

    @torch.no_grad()
    def _entropies(self, tokens: Tensor, plan: ModePlan) -> Tensor:
        """[n, s] of the predictions under one plan."""
        found, size = [], max(1, tokens_at_once(self.model.run.model.vocab_size) // tokens.shape[1])
        info = SequenceInfo.build(plan, device=platform.device())
        for part in tokens.split(size):
            part = platform.to_device(part)
            logits = self.model.chunk(part, None, None, packed_seq_params=info, runtime_gather_output=True)
            logs = logits.float().log_softmax(-1)
            found.append(-(logs.exp() * logs).sum(-1).cpu())
        return torch.cat(found)

    def loss(self, name: str, rule: Rule) -> dict[str, float]:
        """Mean loss of a set under a rule's plans, the share that it lets attend, and the set's size."""
        texts = self.texts[name]
        attends = rule(texts)
        if bool(attends.all()) or not bool(attends.any()):
            losses = texts.losses[0 if bool(attends.all()) else 1]
        else:
            plans = [ModePlan.from_mask(row) for row in attends.numpy()]
            losses = losses_of(self.model, texts.tokens, texts.labels, plans)
        return {
            "loss": float(losses[texts.counted].mean(dtype=torch.float64)),
            "share": float(attends.double().mean()),
            "tokens": int(texts.counted.sum()),
            "bytes": int(self.bytes[texts.labels[texts.counted]].sum()),
        }


def policies(
    sets: Sets, router: OryxRouter, names: Sequence[str], shares: Sequence[float]
) -> Iterator[tuple[str, float | None, Rule]]:
    """Name, wanted share (None: the policy's own) and rule."""
    valid = sets.texts["valid"]
    yield "attention", None, lambda texts: torch.ones_like(texts.counted)
    yield "recurrent", None, lambda texts: torch.zeros_like(texts.counted)
    learned: Linear | None = None
    for share in shares:
        for name in names:
            if name == "learned" and learned is None:
                learned = Linear.fitted(sets.texts["train"])
            if (rule := _rule(name, share, valid, router, learned)) is not None:
                yield name, share, rule
        if share == shares[0]:
            yield "seen", None, repeated


def _rule(name: str, share: float, valid: Texts, router: OryxRouter, learned: Linear | None) -> Rule | None:
    """The rule of a policy at a share; None where it cannot have so many tokens."""
    if name == "router":
        least = router.threshold(share)
        return lambda texts: routed(router, texts) > least
    if name == "random":
        return lambda texts: torch.rand(texts.tokens.shape, generator=torch.Generator().manual_seed(7)) < share
    if name == "ratio":
        return lambda texts: torch.from_numpy(
            parse_plan(f"ratio:{share}", texts.tokens.shape[1], chunk=1).is_attention()
        ).expand_as(texts.tokens)
    if name == "oracle":
        return _above(lambda texts: texts.gains, share, valid)
    if name == "entropy":
        return _above(lambda texts: texts.entropies, share, valid)
    if name == "learned":
        assert learned is not None
        return _above(learned.scores, share, valid)
    assert name == "seen+entropy", name
    if repeated(valid).double().mean() <= share:
        return None
    return _above(lambda texts: texts.entropies.masked_fill(~repeated(texts), -1.0), share, valid)


def _above(score: Score, share: float, valid: Texts) -> Rule:
    """Attend where the score is above the threshold that this share of validation text exceeds."""
    ordered = score(valid)[valid.counted].sort().values
    least = ordered[min(len(ordered) - 1, round((1 - share) * len(ordered)))]
    return lambda texts: score(texts) > least


@functools.cache
def repeated(texts: Texts) -> Tensor:
    """bool [n, s]: tokens that have occurred before in their text."""
    return torch.from_numpy(np.stack([seen(row) for row in texts.tokens.numpy()]))


@functools.cache
@torch.no_grad()
def routed(router: OryxRouter, texts: Texts) -> Tensor:
    """A router's scores."""
    router.to(platform.device())
    return torch.cat([router(platform.to_device(part))[0].cpu() for part in texts.tokens.split(4)])


class Linear(nn.Module):
    """Linear in the token and the two before it, whether each occurred before, and the entropy; least squares."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.tables = nn.ModuleList(nn.Embedding(vocabulary + 1, 1) for _ in range(BEFORE))
        self.rest = nn.Linear(BEFORE + 1, 1)
        for parameter in self.tables.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def fitted(cls, texts: Texts, epochs: int = 8, batch: int = 32) -> Linear:
        """To what attention gained in these texts."""
        torch.manual_seed(0)
        made = cls(int(texts.tokens.max()) + 1)
        features = made.features(texts)
        targets, weights = texts.gains.clamp(-CLIP, CLIP), texts.counted.float()
        optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
        steps = epochs * -(-len(texts.tokens) // batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(texts.tokens)).split(batch):
                errors = (made(*(x[rows] for x in features)) - targets[rows]).square()
                loss = (errors * weights[rows]).sum() / weights[rows].sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return made

    def features(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """int64 [n, s, BEFORE] tokens, 0 where there is none, and float [n, s, BEFORE + 1]."""
        tokens = (texts.tokens + 1).clamp(max=self.vocabulary)
        known = repeated(texts).float()
        back = [(torch.roll(x, i, 1) for x in (tokens, known)) for i in range(BEFORE)]
        ids, before = (torch.stack(part, -1) for part in zip(*back, strict=True))
        first = torch.arange(texts.tokens.shape[1])[:, None] < torch.arange(BEFORE)
        ids, before = ids.masked_fill(first, 0), before.masked_fill(first, 0.0)
        return ids, torch.cat((before, texts.entropies.unsqueeze(-1)), -1)

    def forward(self, ids: Tensor, rest: Tensor) -> Tensor:
        """[n, s]"""
        found = self.rest(rest)
        for i, table in enumerate(self.tables):
            found = found + table(ids[..., i])
        return found.squeeze(-1)

    @functools.cache  # noqa: B019 - lives as long as the comparison
    @torch.no_grad()
    def scores(self, texts: Texts) -> Tensor:
        """Expected gains, nats."""
        return self(*self.features(texts))
