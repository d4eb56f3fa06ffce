"""The functions for programs and notebooks; `from oryx_megatron import load_run, train, load_model, …`.

Everything heavy is imported at the first call. Errors of the user are `oryx_megatron.errors.OryxError`s of one line.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from oryx_megatron import ranks
from oryx_megatron.config import load_run, told_with_place, validate
from oryx_megatron.config.schema import RunConfig, WeightsKind
from oryx_megatron.modes import ModePlan

if TYPE_CHECKING:
    import numpy as np

    from oryx_megatron.eval.text import Generated, Model
    from oryx_megatron.hf.convert import Conversion

__all__ = ["Dataset", "ModePlan", "Trained", "export", "generate", "load_model", "load_run", "train"]


@dataclass(frozen=True)
class Trained:
    """A run that ended, or stopped."""

    folder: Path
    """Its files on this machine: metrics, events and, unless on object storage, checkpoints."""
    iteration: int
    """Steps done."""
    stopped: str | None
    """Why it stopped before its end; None at the end."""

    def steps(self) -> list[dict[str, Any]]:
        """Every step: `iteration`, `loss` (nats per token), `grad_norm`, `lr`, `attention_share`, `seconds`, …."""
        return self._lines("step")

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation: `iteration`, `dataset`, `plan`, `loss` (nats per token), `bits_per_byte`, `ema_loss`."""
        return self._lines("evaluation")

    def _lines(self, kind: str) -> list[dict[str, Any]]:
        from oryx_megatron.train import metrics

        return [line for line in metrics.read_lines(self.folder / metrics.NAME) if line["kind"] == kind]


def train(run: RunConfig | str | Path, *overrides: str) -> Trained:
    """Train a run in this process, or resume it; under torchrun all ranks call it.

    Args:
        run: From `load_run`, or the path of a config.
        overrides: `key=value` for a path, as on the command line.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: what the run's own command would print.
    """
    from oryx_megatron.errors import ConfigError
    from oryx_megatron.eval.router_recipe import recipe
    from oryx_megatron.train.intervals import last_step
    from oryx_megatron.train.remote import run_folder
    from oryx_megatron.train.session import fit

    if not isinstance(run, RunConfig):
        path = run
        run = load_run(path, overrides)
        with told_with_place(path, overrides):
            layout = validate(run, ranks.world_size())
    else:
        if overrides:
            raise ConfigError("train: overrides go to load_run, or with the path of a config")
        layout = validate(run, ranks.world_size())
    stopped = fit(run, layout, after=recipe(run))
    if stopped is None:
        return Trained(run_folder(run), last_step(run), None)
    return Trained(run_folder(run), stopped.iteration, stopped.reason)


def load_model(path: str | Path, *, tokenizer: str | Path | None = None, weights: WeightsKind = "trained") -> Model:
    """A run (its newest checkpoint), a checkpoint or a Hugging Face export, ready to `generate`.

    `weights`: of a checkpoint, those that were trained, or `ema`, their average (train.ema).

    Raises:
        CheckpointError, ConversionError, DataError: nothing there, or damaged.
    """
    from oryx_megatron.eval.text import load

    return load(path, tokenizer=tokenizer, tensor=ranks.world_size(), weights=weights)


def generate(
    model: Model,
    prompt: str,
    new_tokens: int = 100,
    *,
    plan: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Generated:
    """Continue a text: `.text` is what was added, `.attended` the mode of every token, `.share` of attention.

    Args:
        model: From `load_model`.
        prompt: Text to continue.
        new_tokens: Most tokens to add.
        plan: Mode plan, e.g. `prompt:attention,new:recurrent`; None: the model's default.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Sample among the most likely tokens of this total probability.
        seed: Of the sampling.

    Raises:
        ConfigError: a value out of range; no plan, or none for this text or model; a path for a model.
    """
    from oryx_megatron.errors import ConfigError

    if isinstance(model, (str, Path)):
        raise ConfigError(f"generate: expected a model, got {str(model)!r}; load_model({str(model)!r}) gives one")
    return model.generate(prompt, new_tokens, plan=plan, temperature=temperature, top_p=top_p, seed=seed)


def export(source: str | Path, target: str | Path, **options: Any) -> Conversion:
    """Write a run or a checkpoint as a folder for transformers; options of `oryx_megatron.hf.convert.export`.

    Raises:
        ConfigError, CheckpointError, DataError, ConversionError: see there; nothing is written.
    """
    from oryx_megatron.errors import ConfigError
    from oryx_megatron.hf.convert import export as write

    if not isinstance(source, (str, Path)):
        raise ConfigError(f"export: expected the folder of a run or a checkpoint, got {type(source).__name__}")
    return write(source, target, **options)


class Dataset:
    """A tokenized dataset, PREFIX.bin and .idx: `len(d)` documents, `d[i]` the tokens of one, memory-mapped."""

    def __init__(self, prefix: str | Path) -> None:
        """Open and check it; DataError when it is missing or damaged."""
        from oryx_megatron.data.indexed import open_dataset

        self._opened = open_dataset(prefix)

    def __len__(self) -> int:
        return self._opened.documents

    @overload
    def __getitem__(self, number: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, number: slice) -> list[np.ndarray]: ...

    def __getitem__(self, number: int | slice) -> np.ndarray | list[np.ndarray]:
        """Tokens [length] of a document, or a list for a slice; negative numbers count from the end.

        Raises:
            IndexError: no document of this number.
        """
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = operator.index(number)
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        return self._opened.document(number % len(self))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return self._opened.tokens

    @property
    def manifest(self) -> dict[str, Any] | None:
        """PREFIX.json: counts, digests, tokenizer; None for datasets of other tools."""
        return self._opened.manifest
