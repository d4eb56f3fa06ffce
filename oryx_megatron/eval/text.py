"""Text in, text out: a run, a checkpoint or an export with its tokenizer, and which tokens of a text attended."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from oryx_megatron.config.schema import WeightsKind
from oryx_megatron.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.generation import Decoder, Follow, Step, follow, generate, load_for_inference, plan_of
from oryx_megatron.eval.routed import Plans
from oryx_megatron.modes import ModePlan, Plan


class TextCodec(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def eod_id(self) -> int:
        """The token that ends a document."""

    def encode_open(self, text: str) -> list[int]:
        """Tokens of a text that continues: after those that stand before every text, without one that ends it."""

    def decode(self, ids: list[int]) -> str:
        """Text of tokens."""


@dataclass(frozen=True)
class Generated:
    """A text that a model continued; as a `str`, prompt and text."""

    prompt: str
    """As it was given."""
    text: str
    """What was added."""
    prompt_tokens: tuple[int, ...]
    """The prompt's, after those that the tokenizer puts before every text."""
    tokens: tuple[int, ...]
    """The new ones."""
    plan: Plan
    """Of prompt and new tokens; under a router, a last token that nothing read counts as recurrent."""

    @property
    def attended(self) -> list[bool]:
        """For every token of prompt and text, whether it was read by attention, in some layer."""
        return self.plan.anywhere.is_attention().tolist()

    @property
    def share(self) -> float:
        """Share of all tokens that attended, mean over layers."""
        return self.plan.attention_share

    def __str__(self) -> str:
        return self.prompt + self.text

    def summary(self) -> str:
        """How many tokens attended, in one line."""
        given = self.plan.slice(0, len(self.prompt_tokens))
        new = self.plan.slice(len(self.prompt_tokens), self.plan.length)
        named = ((given, "given"), (new, "new"))
        if isinstance(self.plan, ModePlan):
            parts = ", ".join(f"{p.anywhere.attention_tokens} of {p.length} {name}" for p, name in named)
            return f"attention read {self.share:.0%} of {self.plan.length} tokens: {parts}"
        parts = ", ".join(f"{p.attention_share:.0%} of {p.length} {name}" for p, name in named)
        return f"attention read {self.share:.0%} of {self.plan.length} tokens, mean over layers: {parts}"


class Model:
    """A model that continues text under mode plans; `load_model` of the package makes one.

    Attributes:
        decoder: The model with its states, which takes tokens.
        tokenizer: Text to tokens and back.
        default_plan: The mode plan of `generate` without one.
    """

    def __init__(self, decoder: Decoder, tokenizer: TextCodec, default_plan: str) -> None:
        self.decoder, self.tokenizer, self.default_plan = decoder, tokenizer, default_plan

    def _parts(self, prompt: str, tokens: list[int], new_tokens: int, spec: str | None) -> tuple[Follow, Plan | None]:
        """The parts of the plan of a prompt and what follows it, and the whole where it is known before.

        Raises:
            ConfigError: no plan, or none for this text or model.
        """

        def characters(count: int) -> int:
            if count > len(prompt):
                raise ConfigError(
                    f"mode plan `{spec}`: {count} characters are more than the {len(prompt)} of the prompt"
                )
            return bisect.bisect_left(range(len(tokens)), count, key=lambda n: len(self.tokenizer.decode(tokens[:n])))

        spec = spec or self.default_plan
        known = plan_of(self.decoder, spec, len(tokens), new_tokens, characters)
        return (self.decoder.plans(spec).follow(spec) if known is None else follow(known)), known

    def generate(
        self,
        prompt: str,
        new_tokens: int = 100,
        *,
        plan: str | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
        on_token: Callable[[Plan, list[int], int], None] | None = None,
    ) -> Generated:
        """Continue a text by up to `new_tokens` tokens; it ends where the model ends the document.

        Args:
            prompt: Text to continue; none begins a document.
            new_tokens: Most tokens to add.
            plan: Mode plan, e.g. `prompt:attention,new:recurrent`; None: the model's default.
            temperature: Divides the logits; 0 takes the most likely token.
            top_p: Sample among the most likely tokens of this total probability.
            seed: Of the sampling.
            on_token: Called with the plan as far as it is known, the prompt's tokens and each new token.

        Raises:
            ConfigError: a value out of range; no plan, or none for this text or model.
        """
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt: expected text, got {type(prompt).__name__}; call generate for each text")
        if not isinstance(plan, str | None):
            raise ConfigError(f"plan: expected text such as `ratio:0.25`, got {type(plan).__name__}")
        if not isinstance(new_tokens, int):
            raise ConfigError(f"new tokens: {new_tokens!r} is no whole number")
        if new_tokens < 1:
            raise ConfigError(f"new tokens: {new_tokens} should be at least 1")
        if not (temperature >= 0 and 0 < top_p <= 1):
            raise ConfigError(
                "temperature should not be negative, and top_p should be above 0 and at most 1; "
                f"they are {temperature:g} and {top_p:g}"
            )
        tokens = self.tokenizer.encode_open(prompt) or [self.tokenizer.eod_id]
        parts, known = self._parts(prompt, tokens, new_tokens, plan)
        read: list[bool] = []

        def part(piece: Tensor) -> Plan:
            modes = parts(piece)
            read.extend(modes.anywhere.is_attention().tolist())
            return modes

        def tell(token: int) -> None:
            if on_token is not None:
                on_token(known or ModePlan.from_mask(read), tokens, token)

        new = generate(
            self.decoder,
            tokens,
            new_tokens,
            plan=part,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=self.tokenizer.eod_id,
            on_token=tell,
        )
        text = self.tokenizer.decode(tokens + new).removeprefix(self.tokenizer.decode(tokens))
        total = len(tokens) + len(new)
        modes = known.slice(0, total) if known is not None else ModePlan.from_mask((read + [False] * total)[:total])
        return Generated(prompt, text, tuple(tokens), tuple(new), modes)


def load(
    path: str | Path, *, tokenizer: str | Path | None = None, tensor: int = 1, weights: WeightsKind = "trained"
) -> Model:
    """A run (its newest checkpoint), a checkpoint, or an export, ready to continue text.

    Args:
        path: Run folder, checkpoint or Hugging Face folder.
        tokenizer: Tokenizer folder; default the run's, or the export's own.
        tensor: Tensor-parallel ranks of a checkpoint's model; an export runs on one.
        weights: Of a checkpoint: those that were trained, or their average (train.ema).

    Raises:
        CheckpointError, ConversionError, DataError: nothing there, or damaged; a tokenizer of another model.
        ConfigError: the model does not divide over `tensor` ranks.
    """
    if (Path(path) / "config.json").is_file():
        if weights != "trained":
            raise ConfigError(f"{path}: an export holds one kind of weights; leave weights (--weights) out")
        return _load_export(path, tokenizer, tensor)
    model = load_for_inference(path, tensor=tensor, weights=weights)
    codec = load_tokenizer(tokenizer or model.run.data.tokenizer)
    check_tokenizer(codec, model.manifest.tokenizer, str(model.folder))
    return Model(model, codec, "recurrent" if model.modes == "recurrent" else "attention")


def _load_export(path: str | Path, tokenizer: str | Path | None, tensor: int) -> Model:
    from oryx_megatron.eval.export import load_export
    from oryx_megatron.hf.configuration_oryx import OryxConfig

    if tensor > 1:
        raise ConfigError(f"{path}: an export runs on one rank, not {tensor}; give the run or a checkpoint of it")
    model, codec = load_export(path, tokenizer)
    if not isinstance(model.config, OryxConfig):
        raise ConfigError(f"{path} holds a {model.config.model_type} model, which has no modes; give an Oryx export")
    sentencepiece = (Path(path) / "tokenizer.model").is_file()
    spoken = codec if isinstance(codec, Tokenizer) else _PlainTextCodec(codec.tokenizer, model, split=sentencepiece)
    return Model(_Exported(model, str(path)), spoken, model.config.default_plan)


class _PlainTextCodec:
    """The tokenizer of an export, reading texts as training did: where that was SentencePiece, special tokens in a text
    are text.
    """

    def __init__(self, tokenizer: Any, model: Any, *, split: bool) -> None:
        self.tokenizer, self.split = tokenizer, split
        plain, whole = (self._ids("a", special) for special in (False, True))
        starts = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
        self.before = whole[: next(starts, 0)]
        self.eod_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id

    def _ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, split_special_tokens=self.split).input_ids

    def encode_open(self, text: str) -> list[int]:
        """See TextCodec."""
        return [*self.before, *self._ids(text, False)]

    def decode(self, ids: list[int]) -> str:
        """See TextCodec."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class _Exported:
    """An export as a Decoder."""

    model: Any
    name: str

    @property
    def modes(self) -> str:
        return self.model.config.single_mode or "both"

    def plans(self, spec: str) -> Plans:
        return Plans.of_export(self.model)

    def begin(self) -> Step:
        from oryx_megatron.hf.modeling_oryx import OryxCache

        cache = OryxCache(self.model.config)

        def step(tokens: Tensor, plan: Plan, done: int) -> Tensor:
            mask = torch.from_numpy(plan.is_attention())
            out = self.model(tokens, past_key_values=cache, use_cache=True, mode_plan=mask, logits_to_keep=1)
            return out.logits[0, -1].float()

        return step
