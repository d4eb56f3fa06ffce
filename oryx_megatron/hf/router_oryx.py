"""The router: scores every token by what attention mode would gain over recurrent mode there. Stands alone: torch only.

It reads the tokens so far and nothing of the layers, so its decisions are the same whether a text comes at once or
token by token, under any parallel layout, and a plan is known before the layers run. Its embedding starts from the
model's. Attention gains mostly where there is something to find in the text before: the router is told whether the last
one, two and three tokens stood there, how far back, and which token followed them: what attention would find. It also
knows how old and how frequent that follower is, and how likely in training text: what the recurrence knows anyway. A
gated delta rule (arXiv 2412.06464) remembers the rest.

    x = E[token] + W_f features + W_t [E[followed] …]      [b, s, R]
    per layer: q, k, v = SiLU(conv(W x)); x += W_o RMSNorm(delta_rule(q, k, v)); x += MLP(x)
    score = w · RMSNorm(x) + c                             nats, one per token
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm_conv_oryx import causal_conv
from .plans_oryx import routed_share
from .recurrences_oryx import delta_gates, gated_delta_rule, unit

TAPS = 4
"""Of the causal convolutions."""
GRAMS = 3
"""Longest run of tokens that is looked up in the text before."""
FEATURES = 2 * GRAMS
COUNTED = 2 * GRAMS + 1
"""Further features of a router that counts: age and frequency of each follower, frequency of the token."""
EXPECTED = 2 * GRAMS + 1
"""Further ones, from its table: log-probability of each follower after one and after two tokens, and of the token."""
PLACES = 22
"""Bits of a place in a text: 4 M tokens. The other 41 of a key are a token, or the hash of two."""
PADDING = -1
"""In a text's history."""


@dataclass(frozen=True)
class RouterShape:
    """Sizes of a router: vocabulary, width R, layers, heads H of width R / H, and of its table of counts."""

    vocab_size: int
    width: int = 64
    layers: int = 2
    heads: int = 2
    table: int = 0
    """Entries for counts of runs of two and three tokens in training text, by hash. 0: none, and it counts nothing in
    the text either, as routers from before this field."""

    def __post_init__(self) -> None:
        if self.table < 0:
            raise ValueError(f"router: table {self.table} should be at least 0")
        if min(self.vocab_size, self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise ValueError(f"router: width {self.width} should be a positive multiple of heads {self.heads}")

    def to_dict(self) -> dict[str, int]:
        """Fields, as `config.json` and router.json hold them."""
        return asdict(self)


@dataclass
class LayerMemory:
    """What one layer keeps of a text: convolution window [b, 3R, TAPS - 1] and delta rule state [b, H, N, N]."""

    window: Tensor
    memory: Tensor


@dataclass
class RouterState:
    """What a router keeps of a text."""

    history: Tensor
    """int64 [b, t]: its tokens, PADDING where there was none."""
    layers: list[LayerMemory]

    def select(self, rows: Tensor) -> RouterState:
        """The state of these rows [n], in this order."""
        layers = [LayerMemory(x.window[rows], x.memory[rows]) for x in self.layers]
        return RouterState(self.history[rows], layers)


class Found(NamedTuple):
    """What a text holds before each of its tokens [b, s]."""

    features: Tensor
    """[b, s, FEATURES], with counts [b, s, FEATURES + COUNTED]: per run of 1, 2 and 3 tokens 1 where it occurred
    before, else 0; and the logarithm of how many tokens ago, over 8. Then, as logarithms too: per run how many tokens
    ago its follower occurred last, over 8; how often it followed the token, over 4; how often the token occurred."""
    followed: Tensor
    """int64 [b, s, GRAMS]: the token that followed the run then, PADDING where there was none."""
    previous: Tensor
    """int64 [b, s]: the token before, PADDING at the beginning."""


def repetitions(history: Tensor, tokens: Tensor, counts: bool = False) -> Found:
    """Where a token, with its predecessors, stood before: in tokens [b, s] behind a history [b, t].

    Raises ValueError for counts in a text of 2^PLACES tokens or more.
    """
    text, begin = torch.cat((history, tokens), 1), history.shape[1]
    if counts and text.shape[1] >> PLACES:
        raise ValueError(f"a router counts in texts below {1 << PLACES:,} tokens, and this one has {text.shape[1]:,}")
    places = torch.arange(text.shape[1], device=text.device)
    if tokens.shape[1] == 1:
        return next_repetitions(text, places[-1:], counts)
    run, whole, last = torch.zeros_like(text), torch.ones_like(text, dtype=torch.bool), []
    for n in range(GRAMS):
        back = _shifted(text, n)
        whole = whole & (back != PADDING)
        run = run * 1_000_003 + back + 1  # wraps around: runs that differ are taken for equal once in 2^64
        keys = torch.where(whole, run, -places - 2)  # a run cut off by the beginning is like no other
        ordered, order = keys.sort(dim=1, stable=True)
        same = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        earlier = torch.where(same, order.roll(1, 1), -1)
        last.append(torch.empty_like(order).scatter_(1, order, earlier)[:, begin:])
    features, followed = _found(text, places[begin:], torch.stack(last, -1))
    before = _shifted(text, 1)
    if counts:
        here, place = tokens.unsqueeze(-1), places[begin:, None]
        words = _placed(text, places).sort(1).values
        pairs = _placed(_pair(before, text), places).sort(1).values
        last_place = words.gather(1, (_until(words, _placed(followed, place)) - 1).clamp_min(0).flatten(1))
        since = place - (last_place & ((1 << PLACES) - 1)).view_as(followed)
        pair = _pair(here, followed)
        often = _until(pairs, _placed(pair, place)) - _until(pairs, _placed(pair, -1))
        seen = _until(words, _placed(here, place - 1)) - _until(words, _placed(here, -1))
        features = torch.cat((features, _counted(followed, since, often, seen)), -1)
    return Found(features, followed, before[:, begin:])


def next_repetitions(history: Tensor, place: Tensor, counts: bool = False) -> Found:
    """`repetitions` of the one token at a place, int64 [1], of history [b, t], whose later entries are PADDING.

    Waits for nothing and has one shape throughout: a CUDA graph may hold it.
    """
    places = torch.arange(history.shape[1], device=history.device)
    match, last = places < place, []
    for n in range(GRAMS):
        back = _shifted(history, n)
        own = back.index_select(1, place)
        match = match & (back == own) & (own != PADDING)
        last.append(torch.where(match, places, -1).amax(1, keepdim=True))
    features, followed = _found(history, place, torch.stack(last, -1))
    before, token = _shifted(history, 1), history.index_select(1, place)
    if counts:
        follows = (history.unsqueeze(-1) == followed) & (places <= place).unsqueeze(-1)  # [b, t, GRAMS]
        since = place - torch.where(follows, places[:, None], -1).amax(1, keepdim=True)
        often = (follows & (before == token).unsqueeze(-1)).sum(1, keepdim=True)
        seen = ((history == token) & (places < place)).sum(1)[:, None, None]
        features = torch.cat((features, _counted(followed, since, often, seen)), -1)
    return Found(features, followed, before.index_select(1, place))


def _shifted(text: Tensor, n: int) -> Tensor:
    """The tokens [b, t] n places earlier."""
    return F.pad(text[:, : max(text.shape[1] - n, 0)], (min(n, text.shape[1]), 0), value=PADDING)


def _placed(what: Tensor, place: Tensor | int) -> Tensor:
    """Keys that order by what stands at a place, then by place."""
    return (what << PLACES) + place


def _pair(token: Tensor, after: Tensor) -> Tensor:
    """A number of 41 bits for two tokens of any vocabulary: two pairs share one once in 2^41."""
    return ((token * 0x9E3779B97F4A7C1 + after) * 0x1CE4E5B9BF58476D >> PLACES) & ((1 << (63 - PLACES)) - 1)


def _until(ordered: Tensor, keys: Tensor) -> Tensor:
    """How many of ordered keys [b, t] are at most each of keys [b, s, n]."""
    return torch.searchsorted(ordered, keys.flatten(1).contiguous(), right=True).view_as(keys)


def _counted(followed: Tensor, since: Tensor, often: Tensor, seen: Tensor) -> Tensor:
    """Features [b, s, COUNTED] of ages and counts [b, s, GRAMS] of followers and counts [b, s, 1] of tokens."""
    known = followed != PADDING
    of_followers = (torch.where(known, x, 0).float().log1p() / by for x, by in ((since, 8), (often, 4)))
    return torch.cat((*of_followers, seen.float().log1p() / 4), -1)


def _likely(count: Tensor, of: Tensor) -> Tensor:
    """Log-probability of what was counted so often among so many, smoothed: a count may be 0."""
    return (count + 0.1).log() - (of + 1).log()


def _found(text: Tensor, places: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Features [b, s, FEATURES] and followers: of the last earlier places [b, s, GRAMS] of runs that end at places."""
    seen = last >= 0
    distance = (places[:, None] - last).clamp_min(1).float().log() / 8
    followed = text.gather(1, (last + 1).clamp_max(text.shape[1] - 1).flatten(1)).view_as(last)
    features = torch.stack((seen.float(), torch.where(seen, distance, 0.0)), -1).flatten(2)
    return features, torch.where(seen, followed, PADDING)


class RouterLayer(nn.Module):
    """One delta rule block and one MLP."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        r, self.heads = shape.width, shape.heads
        self.norm, self.out_norm, self.mlp_norm = (nn.RMSNorm(r, eps=1e-5) for _ in range(3))
        self.qkv = nn.Linear(r, 3 * r, bias=False)
        self.gates = nn.Linear(r, 2 * self.heads, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * r, TAPS).uniform_(-(TAPS**-0.5), TAPS**-0.5))
        self.a_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.full((self.heads,), -4.0))  # α near 1: it remembers thousands of tokens
        self.out = nn.Linear(r, r, bias=False)
        self.up, self.down = nn.Linear(r, 2 * r, bias=False), nn.Linear(2 * r, r, bias=False)

    def forward(self, x: Tensor, state: LayerMemory | None, valid: Tensor | None) -> tuple[Tensor, LayerMemory]:
        """x [b, s, R]; valid [b, s]: false at padding, which leaves no trace in the state."""
        y = self.norm(x)
        qkv, (a, gate) = self.qkv(y), self.gates(y).chunk(2, -1)
        if valid is not None:
            qkv = qkv * valid.unsqueeze(-1)
        mixed, window = causal_conv(qkv, self.conv, silu=True, initial=None if state is None else state.window)
        assert window is not None  # it is final
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in mixed.chunk(3, -1))
        log_decay, beta = delta_gates(a, gate, self.dt_bias, self.a_log)
        if valid is not None:
            log_decay, beta = log_decay * valid.unsqueeze(-1), beta * valid.unsqueeze(-1)
        scale = q.shape[-1] ** -0.5
        o, memory = gated_delta_rule(
            unit(q, scale), unit(k), v, log_decay, beta, initial=None if state is None else state.memory
        )
        assert o is not None  # q was given
        x = x + self.out(self.out_norm(o.flatten(2).to(x.dtype)))
        x = x + self.down(F.silu(self.up(self.mlp_norm(x))))
        return x, LayerMemory(window.detach(), memory.detach())


class OryxRouter(nn.Module):
    """Scores of tokens, and the thresholds above which shares of held-out text lie.

    `quantiles` [n] holds the scores below which 0, 1/(n-1), … 1 of the held-out tokens lay: `router:R` lets a token
    attend where its score is above the quantile 1 - R.
    """

    quantiles: Tensor
    table: Tensor
    """[table]: counts in training text of runs of two and three tokens, by hash."""
    singles: Tensor
    """[vocab_size]: counts of tokens."""

    def __init__(self, shape: RouterShape, quantiles: int = 1001) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.features = nn.Linear(FEATURES + (COUNTED + EXPECTED if shape.table else 0), shape.width)
        self.followed = nn.Linear(GRAMS * shape.width, shape.width, bias=False)
        self.layers = nn.ModuleList(RouterLayer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.score = nn.Linear(shape.width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.register_buffer("quantiles", torch.zeros(quantiles, dtype=torch.float32))
        if shape.table:
            self.register_buffer("table", torch.zeros(shape.table, dtype=torch.float32))
            self.register_buffer("singles", torch.zeros(shape.vocab_size, dtype=torch.float32))

    def forward(
        self, tokens: Tensor, state: RouterState | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, RouterState]:
        """Scores [b, s] (nats, fp32) of tokens int64 [b, s] that follow the text of `state`, and the state after them.

        `valid` [b, s] is false at padding.
        """
        history = tokens[:, :0] if state is None else state.history
        known = tokens if valid is None else tokens.masked_fill(~valid, PADDING)
        found = repetitions(history, known, self.counts)
        scores, layers = self.scores(tokens, found, None if state is None else state.layers, valid)
        return scores, RouterState(torch.cat((history, known), 1), layers)

    def scores(
        self,
        tokens: Tensor,
        found: Found,
        memories: list[LayerMemory] | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerMemory]]:
        """Scores [b, s] of tokens [b, s], of what `repetitions` found for them; and what the layers remember then."""
        features, followed, previous = found
        if self.counts:
            features = torch.cat((features, self._expected(tokens, followed, previous)), -1)
        x = self.embedding(tokens) + self.features(features.to(self.features.weight.dtype))
        then = self.embedding(followed.clamp_min(0)) * (followed != PADDING).unsqueeze(-1)
        x, kept = x + self.followed(then.flatten(2)), []
        for i, layer in enumerate(self.layers):
            x, memory = layer(x, None if memories is None else memories[i], valid)
            kept.append(memory)
        return self.score(self.norm(x)).squeeze(-1).float(), kept

    @property
    def counts(self) -> bool:
        """Whether it counts in the text and knows counts of training text."""
        return self.shape.table > 0

    def _expected(self, tokens: Tensor, followed: Tensor, previous: Tensor) -> Tensor:
        """Logarithms over 8 [b, s, EXPECTED] of how likely followers and the token are in training text."""
        here, before = tokens.unsqueeze(-1), previous.unsqueeze(-1)
        pair = self.table[self._entry(before, here)]
        after_one = _likely(self.table[self._entry(here, followed)], self.singles[here])
        after_two = _likely(self.table[self._entry(before, here, followed)], pair)
        known = followed != PADDING
        of_followers = (torch.where(known, x, 0.0) for x in (after_one, after_two))
        own = _likely(pair, self.singles[before.clamp_min(0)])
        return torch.cat((*of_followers, torch.where(before != PADDING, own, 0.0)), -1) / 8

    def _entry(self, *run: Tensor) -> Tensor:
        """Where the count of a run of tokens lies in the table."""
        key = torch.zeros_like(run[-1])
        for token in run:
            key = (key + token + 1) * 0x9E3779B97F4A7C1 + len(run)
        return (key ^ (key >> 32)) % self.shape.table

    @torch.no_grad()
    def count(self, tokens: Tensor) -> None:
        """Add texts [n, s] to the counts of training text."""
        runs = (tokens[:, :-1], tokens[:, 1:]), (tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:])
        for run in runs:
            self.table += torch.bincount(self._entry(*run).flatten(), minlength=self.shape.table)
        self.singles += torch.bincount(tokens.flatten(), minlength=self.shape.vocab_size)

    def threshold(self, share: float) -> float:
        """Score above which this share (0 to 1) of held-out tokens lay; interpolated. 0 and 1: no token, all tokens."""
        if share <= 0.0 or share >= 1.0:
            return float("inf") if share <= 0.0 else float("-inf")
        place = (1.0 - share) * (len(self.quantiles) - 1)
        low = int(place)
        below, above = self.quantiles[low], self.quantiles[min(low + 1, len(self.quantiles) - 1)]
        return float(below + (above - below) * (place - low))

    @torch.no_grad()
    def start_from(self, embedding: Tensor) -> None:
        """Start from a model's embedding [vocabulary, d]: its directions of most variance, at unit size."""
        table = embedding.float()
        table = table - table.mean(0)
        _, _, directions = torch.pca_lowrank(table, min(self.shape.width, *table.shape), center=False, niter=4)
        start = table @ directions
        self.embedding.weight.zero_()
        self.embedding.weight[: len(start), : start.shape[1]] = start / start.std().clamp_min(1e-6)

    @torch.no_grad()
    def calibrate(self, scores: Tensor) -> None:
        """Set `quantiles` from the scores of held-out tokens."""
        points = torch.linspace(0, 1, len(self.quantiles), dtype=torch.float64)
        ordered = scores.flatten().double().cpu().sort().values
        place = points * (len(ordered) - 1)
        low = place.long()
        high = (low + 1).clamp(max=len(ordered) - 1)
        self.quantiles.copy_(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


class RouterSteps:
    """A router's scores of one token after the other at fixed addresses; on a GPU replayed as a CUDA graph.

    As `OryxDecoder` does it: the first two steps run as they are, the third is recorded.
    """

    def __init__(self, router: OryxRouter, state: RouterState, room: int) -> None:
        """Behind the text of `state`; `room`: tokens of the longest text."""
        self.router, (b, self.length) = router, state.history.shape
        self.history = state.history.new_full((b, room), PADDING)
        self.history[:, : self.length] = state.history
        self.place = torch.full((1,), self.length, dtype=torch.long, device=self.history.device)
        self.tokens = torch.zeros_like(self.history[:, :1])
        self.layers = [LayerMemory(x.window.clone(), x.memory.clone()) for x in state.layers]
        self.seen = 0
        self.graph: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Scores [b, 1] of tokens [b, 1]; overwritten by the next step."""
        self.tokens.copy_(tokens)
        self.seen, self.length = self.seen + 1, self.length + 1
        if self.graph is None and self.tokens.is_cuda and self.seen > 2:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                scores = self._forward()
            self.graph = graph, scores
        if self.graph is None:
            return self._forward()
        graph, scores = self.graph
        graph.replay()
        return scores

    def _forward(self) -> Tensor:
        self.history.index_copy_(1, self.place, self.tokens)
        found = next_repetitions(self.history, self.place, self.router.counts)
        scores, layers = self.router.scores(self.tokens, found, self.layers)
        for kept, new in zip(self.layers, layers):
            kept.window.copy_(new.window)
            kept.memory.copy_(new.memory)
        self.place.add_(1)
        return scores

    def state(self) -> RouterState:
        """Of the text so far."""
        layers = [LayerMemory(x.window.clone(), x.memory.clone()) for x in self.layers]
        return RouterState(self.history[:, : self.length].clone(), layers)


class Routed:
    """What a model with a router does: `config.router` has its sizes, `mode_router` is the module."""

    config: Any
    mode_router: OryxRouter

    def routed_share(self, plan: Any) -> float | None:
        """Share of a plan that is the router's; None for other plans. None stands for the default plan."""
        plan = self.config.default_plan if plan is None else plan
        return routed_share(plan) if isinstance(plan, str) else None

    @torch.no_grad()
    def route(self, share: float, tokens: Tensor | None, valid: Tensor | None = None, cache: Any = None) -> Tensor:
        """Which of a call's tokens [b, s] attend under `router:SHARE`, CPU bool [b, s]; the cache keeps the state.

        `valid` [b, s] is false at padding. Raises ValueError without a router, without token numbers, and behind a
        cache whose tokens were read under another plan.
        """
        plan = f"mode plan `router:{share:g}`"
        if self.config.router is None:
            raise ValueError(f"{plan}: this model has no router; train one (oryx router RUN) and export it again")
        if tokens is None:
            raise ValueError(f"{plan}: a router reads input_ids, and inputs_embeds were given")
        state = None if cache is None else cache.router
        if cache is not None and cache.started and state is None:
            raise ValueError(f"{plan}: the cache holds tokens read under another plan; start from an empty one")
        scores, state = self.mode_router(tokens, state, valid)
        if cache is not None:
            cache.router = state
        attends = scores > self.mode_router.threshold(share)
        return (attends if valid is None else attends & valid).cpu()


def shape_of(fields: dict[str, Any]) -> RouterShape:
    """A shape from the fields that `RouterShape.to_dict` gave. ValueError for other or wrong ones."""
    known = {"vocab_size", "width", "layers", "heads", "table"}
    if set(fields) | {"table"} != known or not all(type(value) is int for value in fields.values()):
        raise ValueError(f"router: expected whole numbers {', '.join(sorted(known))}, got {fields}")
    return RouterShape(**fields)
