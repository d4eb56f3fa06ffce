"""Generation with Oryx: what `generate` does otherwise than transformers, and steps as CUDA graphs.

transformers' generate calls the methods of `OryxGenerationMixin` on its way; the plan is resolved once, when prompt and
number of new tokens are known, and each step gets the modes of its own tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import EosTokenCriteria, GenerationMixin, MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .cache_oryx import OryxCache
from .modes_oryx import FirstSlots, LayerModes, RoutedPlan, SlotPlan, TokenModes, distinct_plans, plan_mask
from .plans_oryx import routed_share
from .speculation_oryx import check_speculation, speculate

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls the cache, in arguments and outputs; `forward` and `generate` take both."""


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


class OryxGenerationMixin(GenerationMixin):
    """`generate` with `mode_plan`, `keep_kv` and `speculative` beside its usual arguments.

    `speculative` (True, or a number of tokens) drafts with the heads of multi-token prediction (speculation_oryx.py).
    """

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        return super().generate(*args, **kwargs, **({} if cache is None else {CACHE: cache}))

    def _prepare_generated_length(self, generation_config, *args: Any, **kwargs: Any):
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        generation_config._new_tokens = generation_config.max_length - kwargs["input_ids_length"]
        return generation_config

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        """Make the OryxCache, and the SlotPlan of prompt and new tokens."""
        cache = OryxCache.of(model_kwargs.get(CACHE), self.config)
        generation_config._cache_is_the_callers = cache is not None
        keep_kv = getattr(cache, "keep_kv", self.config.keep_kv)
        keep_kv = _setting("keep_kv", model_kwargs, generation_config, keep_kv)
        given = model_kwargs.get("mode_plan") is not None
        plan = _setting("mode_plan", model_kwargs, generation_config, self.config.default_plan)
        share = routed_share(plan) if isinstance(plan, str) else None
        if share is not None and not keep_kv:
            raise ValueError(
                f"keep_kv=False with the mode plan `{plan}`: a router may let any new token attend, which needs the "
                "keys and values of earlier ones; keep them"
            )
        positions, mask = model_kwargs["position_ids"], model_kwargs.get("attention_mask")
        prompt, new = positions.shape[-1], generation_config._new_tokens

        plans, of_layer = distinct_plans(plan, self.config.num_hidden_layers)

        def tables_of(virtual: int) -> list[Tensor]:
            real = torch.ones(1, prompt, dtype=torch.bool) if mask is None else mask.bool().cpu()
            real = F.pad(real, (virtual, 0), value=True)
            lengths = real.sum(1).tolist()
            index = (F.pad(real, (0, new), value=True).long().cumsum(1) - 1).clamp(min=0)
            found = []
            for own in plans:
                tables = {
                    n: plan_mask(own, n + new, chunk=self.config.mode_chunk, prompt=n, shorter=not given)
                    for n in sorted(set(lengths))
                }
                found.append(torch.stack([tables[n][i] for n, i in zip(lengths, index)]))
            return found

        done = 0 if cache is None else int(cache.get_seq_length())
        slots: SlotPlan | RoutedPlan
        if share is None:
            slots = SlotPlan(tables_of, positions.device, done, of_layer)
        else:
            slots = RoutedPlan(self.model, share, done)
        # The last new token is never read.
        always = self.config.layer_modes is not None and "attention" in self.config.kinds
        planned = isinstance(slots, SlotPlan) and slots.attends(prompt, prompt + new - 1)
        if not keep_kv and new > 1 and (always or planned):
            raise ValueError(
                "keep_kv=False with attention: the mode plan reads new tokens by attention, which needs the keys and "
                "values of earlier ones; keep them, or use a plan like prompt:attention,new:recurrent"
            )
        model_kwargs["mode_plan"] = slots
        wanted = _setting("speculative", model_kwargs, generation_config, 0)
        generation_config._speculative = check_speculation(
            self, wanted, generation_config, model_kwargs, cache is not None
        )
        if generation_config.use_cache is False or cache is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation `{kind}`: Oryx has `dynamic` and `static`")
        room = None
        if kind == "static":
            # As long as ever asked for, so that a shorter text runs what is compiled; the last new token is never read.
            room = max(
                prompt + new - 1,
                getattr(generation_config, "max_cache_len", None) or 0,
                getattr(self, "_previous_max_cache_length", 0),
            )
            self._previous_max_cache_length = room
        model_kwargs[CACHE] = OryxCache(self.config, room, keep_kv)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        mode_plan: SlotPlan | None = None,
        keep_kv: bool | None = None,
        speculative: bool | int | None = None,
        cache: Cache | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> dict:
        """Arguments of the next forward call, with the modes of its tokens.

        `tokenizer` is of `stop_strings`: transformers hands it on with the model's arguments.
        """
        cache = one_cache(past_key_values, cache)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if isinstance(mode_plan, RoutedPlan):
            tokens = inputs.get("input_ids")
            inputs["mode_plan"] = mode_plan.modes(tokens, attention_mask, cache)
            mode_plan.done = tokens.shape[1] + (0 if cache is None else mode_plan.done)
        elif isinstance(mode_plan, SlotPlan):
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            # Counted here on the host: a static cache has its length on the device.
            start = 0 if cache is None else mode_plan.done
            mode_plan.done = start + tokens.shape[1]
            # PEFT stands in for this method, calls it, and then adds its tokens.
            wrapped = start == 0 and "prepare_inputs_for_generation" in self.__dict__
            modes = FirstSlots(mode_plan, mode_plan.done) if wrapped else mode_plan.modes(start, mode_plan.done)
            inputs["mode_plan"] = modes
        elif mode_plan is not None:
            inputs["mode_plan"] = mode_plan
        return inputs

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs: Any,
    ):
        """Greedy decoding and sampling; with a static cache the host never waits for the device in between.

        transformers' own loop, which asks the device after every token whether to stop, serves where something looks
        at the text as it grows: streamers, returned scores, other stopping criteria than length and end-of-text.
        """
        cache = model_kwargs.get(CACHE)
        if count := getattr(generation_config, "_speculative", 0):
            if synced_gpus:
                raise ValueError("speculative: not with synced_gpus; ranks would read different numbers of tokens")
            plan = model_kwargs["mode_plan"]
            how = (logits_processor, stopping_criteria, generation_config, streamer, cache, plan)
            return speculate(self, input_ids, count, *how)
        plain = all(isinstance(criterion, MaxLengthCriteria | EosTokenCriteria) for criterion in stopping_criteria)
        in_graph = self.config._attn_implementation in ("eager", "sdpa")  # the others read the device on the host
        if not (
            plain
            and in_graph
            and isinstance(model_kwargs.get("mode_plan"), SlotPlan | RoutedPlan)
            and isinstance(cache, OryxCache)
            and cache.layers[0].is_compileable
            and streamer is None
            and not synced_gpus
            and not generation_config.return_dict_in_generate
        ):
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        positions = model_kwargs["position_ids"][:, -1:] + 1
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        mask = None
        if cache.keep_kv and model_kwargs.get("attention_mask") is not None:
            mask = self.create_masks_for_generate(model_kwargs["attention_mask"], cache).bool()
        decoder = OryxDecoder(self, cache, positions.expand(input_ids.shape[0], 1), mask)
        return _decode(decoder, outputs.logits[:, -1], input_ids, logits_processor, generation_config, model_kwargs)

    def create_masks_for_generate(
        self, attention_mask: Tensor | None, past_key_values: Cache | None = None, cache: Cache | None = None, **_: Any
    ):
        """The 2D mask, as wide as a static cache: a compiled step sees one shape."""
        limit = one_cache(past_key_values, cache).get_max_length()
        if attention_mask is None or attention_mask.shape[1] >= limit:
            return attention_mask
        return F.pad(attention_mask, (0, limit - attention_mask.shape[1]), value=1)


class OryxDecoder:
    """Steps of one token over a static cache: compiled, and on a GPU replayed as CUDA graphs, one per kind of step.

    The kinds are: every row attends, every row recurs, rows differ; where layers differ, one of these for each of their
    plans. The first two steps of a kind run as they are (they compile and choose kernels), the third is recorded; so
    short texts pay for nothing they do not use.
    """

    def __init__(self, model: PreTrainedModel, cache: OryxCache, positions: Tensor, mask: Tensor | None = None) -> None:
        """`positions` [b, 1] of the next tokens; `mask` [b, room], false for padding, or None."""
        self.model, self.cache, self.mask = model, cache, mask
        self.positions = positions.clone()
        self.tokens = torch.zeros_like(self.positions)
        self.rows: list[Tensor] = []
        """[b, 1] which rows attend where they differ, for each plan of a step."""
        self.seen: dict[str | LayerModes, int] = {}
        self.graphs: dict[str | LayerModes, tuple[Any, Tensor]] = {}

    @torch.no_grad()
    def step(self, tokens: Tensor, modes: TokenModes | LayerModes | str) -> Tensor:
        """Logits [b, vocabulary] after tokens [b]; overwritten by the next step."""
        own = modes.distinct if isinstance(modes, LayerModes) else (modes,)
        kinds = tuple(mode if isinstance(mode, str) else "rows" for mode in own)
        kind = LayerModes(kinds, modes.of_layer) if isinstance(modes, LayerModes) else kinds[0]
        self.tokens.copy_(tokens[:, None])
        while len(self.rows) < len(own):
            self.rows.append(torch.zeros_like(self.positions, dtype=torch.bool))
        for buffer, mode in zip(self.rows, own):
            if not isinstance(mode, str):
                buffer.copy_(torch.full_like(buffer, not mode.recurs) if mode.rows is None else mode.rows)
        self.seen[kind] = self.seen.get(kind, 0) + 1
        if kind not in self.graphs and self.tokens.is_cuda and self.seen[kind] > 2:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward(kind)
            self.graphs[kind] = graph, logits
        if kind in self.graphs:
            graph, logits = self.graphs[kind]
            graph.replay()
            return logits
        return self._forward(kind)

    def _forward(self, kind: str | LayerModes) -> Tensor:
        kinds = kind.distinct if isinstance(kind, LayerModes) else (kind,)
        own = tuple(k if k != "rows" else TokenModes(((0, 1),), True, rows) for k, rows in zip(kinds, self.rows))
        base = self.model.model
        base.compiled = self.tokens.is_cuda
        try:
            out = self.model(
                input_ids=self.tokens,
                attention_mask=self.mask,
                position_ids=self.positions,
                cache=self.cache,
                use_cache=True,
                mode_plan=LayerModes(own, kind.of_layer) if isinstance(kind, LayerModes) else own[0],
            )
        finally:
            base.compiled = False
        self.positions.add_(1)
        return out.logits[:, -1]


@torch.no_grad()
def _decode(
    decoder: OryxDecoder,
    logits: Tensor,
    input_ids: Tensor,
    logits_processor,
    generation_config,
    model_kwargs: dict,
    period: int = 16,
) -> Tensor:
    """The loop over new tokens. End-of-text is looked for every `period` tokens, in a copy made one period before.

    A cache that the caller keeps may not run ahead of the text, so there it is looked for after every token.
    """
    plan: SlotPlan | RoutedPlan = model_kwargs["mode_plan"]
    eos, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    b, start = input_ids.shape
    length = generation_config.max_length
    offset = plan.done - start  # slots that are in the cache but not in input_ids
    text = input_ids.new_zeros(b, length)
    text[:, :start] = input_ids
    going = torch.ones(b, dtype=torch.bool, device=text.device)
    exact = generation_config._cache_is_the_callers
    watch = _Watch(text.device)
    end = start
    if isinstance(plan, RoutedPlan):
        plan.begin_steps(decoder.cache)
    while True:
        scores = logits_processor(text[:, :end], logits.to(torch.float32, copy=True))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if eos is not None:
            tokens = torch.where(going, tokens, pad)
            going = going & (tokens[:, None] != eos).all(1)
        text[:, end] = tokens
        end += 1
        if end == length:
            break
        if eos is not None and exact and not bool(going.any()):
            break
        if eos is not None and not exact and (end - start) % period == 0 and watch.finished(going):
            break
        if isinstance(plan, RoutedPlan):
            modes = plan.next_modes(tokens[:, None])
        else:
            modes = plan.modes(offset + end - 1, offset + end)
        logits = decoder.step(tokens, modes)
    if isinstance(plan, RoutedPlan):
        plan.end_steps(decoder.cache)
    if eos is not None:
        # Rows are padded after their end; what all rows had ended before is cut off.
        ended = (text[:, start:end, None] == eos).any(2)
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, end - start)
        end = start + int(first.max())
    return text[:, :end]


class _Watch:
    """Whether all rows ended, as it was when last asked: the copy to the host runs beside the steps."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flag = torch.zeros((), dtype=torch.bool, pin_memory=self.cuda)
        self.copied: Any = None

    def finished(self, going: Tensor) -> bool:
        if not self.cuda:
            return not bool(going.any())
        done = self.copied is not None and self.copied.query() and bool(self.flag)
        self.flag.copy_(~going.any(), non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record()
        return done


def _setting(name: str, model_kwargs: dict, generation_config: Any, default: Any) -> Any:
    """An argument of generate, an entry of the generation config, or the model's default."""
    value = model_kwargs.pop(name, None)
    value = getattr(generation_config, name, None) if value is None else value
    return default if value is None else value
