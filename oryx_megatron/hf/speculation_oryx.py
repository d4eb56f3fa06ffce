"""Self-speculative greedy decoding: the heads of multi-token prediction draft, one pass of the model verifies.

A round: the heads draft the next tokens; the model reads the last token and the drafts in one pass; drafts stay as far
as they are what the model itself chooses, and its choice after them is one token more. So the text is that of plain
greedy decoding, whatever the heads say. What the model had read of drafts that do not stay is taken back out of every
state (`TwoStates.mark`): keys and values are cut off, and the recurrent state and the window are those that were kept
after the last token that stays. Nothing is recomputed, and nothing is approximate.

Shapes: b is 1, d hidden size; text x_0 … x_{L-1}, of which the last token is not yet read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache_oryx import OryxCache, OryxDynamicLayer
from .heads_oryx import head_modes
from .modes_oryx import SlotPlan


@dataclass
class Speculation:
    """What came of the drafts of one text."""

    drafted: int = 0
    """Tokens that heads drafted."""
    accepted: int = 0
    """Of them, those that stayed."""
    passes: int = 0
    """Forward passes of the model behind the prompt's."""
    tokens: int = 0
    """Tokens that these passes gave."""

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stayed."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_pass(self) -> float:
        """1 in plain decoding."""
        return self.tokens / max(self.passes, 1)


@dataclass
class OryxSpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and what came of the drafts."""

    speculation: Speculation | None = None


def check_speculation(model: Any, wanted: int, generation_config: Any, model_kwargs: dict, given_cache: bool) -> int:
    """Drafted tokens a round; `wanted` True: one a head. ValueError with one line on what drafts do not work with."""
    if not wanted:
        return 0
    heads = model.config.num_nextn_predict_layers
    if not heads:
        raise ValueError("speculative: this model has no heads to draft with (num_nextn_predict_layers is 0)")
    if wanted is not True and (not isinstance(wanted, int) or wanted < 1):
        raise ValueError(f"speculative={wanted!r}: give True, or the number of tokens to draft in a round")
    mask, plan = model_kwargs.get("attention_mask"), model_kwargs["mode_plan"]
    why = {
        "do_sample": bool(generation_config.do_sample),
        "num_beams": (generation_config.num_beams or 1) > 1,
        "several texts at once": model_kwargs["position_ids"].shape[0] > 1,
        "padding": mask is not None and not bool(mask.all()),
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        "use_cache=False": generation_config.use_cache is False,
        "a cache of earlier tokens": given_cache,
        f"cache_implementation={generation_config.cache_implementation!r}": generation_config.cache_implementation
        not in (None, "dynamic"),
        "output_attentions": bool(generation_config.output_attentions),
        "output_hidden_states": bool(generation_config.output_hidden_states),
        "a mode plan `router:R`": not isinstance(plan, SlotPlan),
        "PEFT's generate (merge the adapter)": "prepare_inputs_for_generation" in model.__dict__,
    }
    if found := [name for name, true in why.items() if true]:
        raise ValueError(f"speculative: not with {found[0]}; it decodes one text greedily, from its first token")
    return heads if wanted is True else wanted


class Drafter:
    """The heads, each with the states of its layer and what it has yet to read.

    Head k reads at token t what head k - 1 made of t, and x_{t+k}. Where x_{t+k} is a draft itself, it reads on trial:
    its states are rolled back after the round.
    """

    def __init__(self, model: Any, plan: SlotPlan, cache: OryxCache) -> None:
        """`model`: OryxForCausalLM; `plan`: of the text; `cache`: the model's, for what it keeps."""
        self.model, self.plan = model, plan
        config, heads = model.config, len(model.mtp)
        self.kind = config.modes_of(config.num_hidden_layers)
        self.keep_kv = cache.keep_kv and self.kind != "recurrent"
        self.states = [OryxDynamicLayer(self.keep_kv) for _ in range(heads)]
        self.done = [0] * heads
        """Tokens that each head has read for good."""
        self.given: list[list[Tensor]] = [[] for _ in range(heads)]
        """What the head before made of the tokens from there on, [1, ·, d] each."""

    def take(self, hidden: Tensor) -> None:
        """`hidden` [1, s, d]: what the model made of the next s tokens of the text."""
        self.given[0].append(hidden)

    def draft(self, text: Tensor, count: int) -> list[int]:
        """The tokens that may follow `text` [1, L], of all of whose tokens but the last `take` was told."""
        length, drafts = text.shape[1], list[int]()
        trial: Tensor | None = None  # what the head before made of tokens on trial
        for k, head in enumerate(self.model.mtp[: min(count, length)], 1):
            given = torch.cat(self.given[k - 1], 1)
            start = self.done[k - 1]
            known = max(length - k - start, 0)
            outputs = None
            if known:
                tokens = text[:, start + k : start + k + known]
                outputs = self._run(head, k, tokens, given[:, :known], start)
                self.done[k - 1] += known
                self.given[k - 1] = [given[:, known:]]
                if k < len(self.given):
                    self.given[k].append(outputs)
            inputs = given[:, known:] if trial is None else torch.cat([given[:, known:], trial], 1)
            last = k == min(count, length, len(self.model.mtp))
            more = count - k if last else 0
            trial = None
            if k > 1 or more:
                outputs, trial = self._on_trial(head, k, inputs, outputs, drafts, more)
            assert outputs is not None
            if not more:
                drafts.append(self._choice(outputs))
        return drafts

    def _on_trial(
        self, head: Any, k: int, inputs: Tensor, outputs: Tensor | None, drafts: list[int], more: int
    ) -> tuple[Tensor, Tensor]:
        """Head k over tokens whose future is drafted, and `more` drafts by what it made itself of the token before.

        Returns its outputs, and those that the next head reads on trial.
        """
        states, fresh = self.states[k - 1], not self.states[k - 1].started
        states.mark()
        start, trial = self.done[k - 1], inputs[:, :0]
        if k > 1:
            outputs = trial = self._run(head, k, self._tokens(drafts[: k - 1]), inputs, start)
            start += trial.shape[1]
        assert outputs is not None
        for i in range(more + 1 if more else 0):
            drafts.append(self._choice(outputs))
            if i < more:
                outputs = self._run(head, k, self._tokens(drafts[-1:]), outputs[:, -1:], start + i)
        if fresh:
            self.states[k - 1] = OryxDynamicLayer(self.keep_kv)
        else:
            states.keep(0)
        return outputs, trial

    def _run(self, head: Any, k: int, tokens: Tensor, hidden: Tensor, start: int) -> Tensor:
        """Head k over tokens of the slots from `start` on, [1, s, d]; `tokens` are those k further on."""
        base, states = self.model.model, self.states[k - 1]
        embedded, s = base.embed_tokens(tokens), tokens.shape[1]
        modes = head_modes(base.config, self.plan.modes(start, start + s), s)
        positions = torch.arange(start, start + s, device=tokens.device)[None]
        context = base.contexts({self.kind: modes}, positions, start, embedded)[self.kind]
        return head(embedded, hidden, context, states)

    def _tokens(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.model.embed_tokens.weight.device)

    def _choice(self, outputs: Tensor) -> int:
        return int(self.model.logits_of(outputs[:, -1:]).argmax())


@torch.no_grad()
def speculate(
    model: Any,
    text: Tensor,
    count: int,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    cache: OryxCache,
    plan: SlotPlan,
) -> Tensor | OryxSpeculativeOutput:
    """`GenerationMixin._sample` of one text [1, n], greedily, with `count` tokens drafted a round."""
    wanted = generation_config.return_dict_in_generate
    scores: tuple[Tensor, ...] | None = () if wanted and generation_config.output_scores else None
    logits: tuple[Tensor, ...] | None = () if wanted and generation_config.output_logits else None
    end, found = generation_config.max_length, Speculation()

    def choose(own: Tensor) -> bool:
        """Append the model's choice by its logits [1, V]; whether the text ends with it."""
        nonlocal text, scores, logits
        own = own.to(torch.float32, copy=True)
        score = logits_processor(text, own)
        token = score.argmax(-1, keepdim=True)
        text = torch.cat([text, token], 1)
        scores = None if scores is None else (*scores, score)
        logits = None if logits is None else (*logits, own)
        if streamer is not None:
            streamer.put(token[0].cpu())
        return bool(stopping_criteria(text, scores).all())

    def read(tokens: Tensor, start: int) -> Tensor:
        modes = plan.modes(start, start + tokens.shape[1])
        return model.model(input_ids=tokens, cache=cache, use_cache=True, mode_plan=modes).last_hidden_state

    drafter, layers = Drafter(model, plan, cache), list[Any](cache.layers)
    hidden = read(text, 0)
    finished = choose(model.logits_of(hidden[:, -1:])[:, -1])
    while not finished:
        drafter.take(hidden)
        length = text.shape[1]
        drafts = drafter.draft(text, min(count, end - length - 1))
        for layer in layers:
            layer.mark()
        drafted = torch.tensor([drafts], dtype=text.dtype, device=text.device)
        hidden = read(torch.cat([text[:, -1:], drafted], 1), length - 1)
        own, kept = model.logits_of(hidden), 0
        while True:
            finished = choose(own[:, kept])
            kept += 1
            if finished or kept > len(drafts) or int(text[0, -1]) != drafts[kept - 1]:
                break
        for layer in layers:
            layer.keep(kept)
        hidden = hidden[:, :kept]
        found.passes += 1
        found.tokens += kept
        found.drafted += len(drafts)
        found.accepted += kept - 1
    if streamer is not None:
        streamer.end()
    plan.done = text.shape[1] - 1
    if not wanted:
        return text
    output: Any = {"sequences": text, "scores": scores, "logits": logits, "past_key_values": cache}
    return OryxSpeculativeOutput(**output, speculation=found)
