"""The microbatches of one rank, read ahead.

The order of samples over the run does not depend on the layout: rank r of dp reads, for microbatch m of a step, samples
consumed + (m·dp + r)·micro_batch_size + i. So `consumed` alone is the stream's state, whatever the batch sizes were.
Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch.utils.data import DataLoader

from oryx_megatron.data.workers import in_one_line
from oryx_megatron.errors import DataError

if TYPE_CHECKING:
    from oryx_megatron.data.loader import Blend


class Batch(TypedDict):
    """One microbatch. `documents`: per row the cumulative document starts, int32 [0, …, s]; None when joined."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    documents: list[torch.Tensor] | None


class SampleStream:
    """The microbatches of one rank, read ahead in a thread (and in `num_workers` processes when asked).

    `consumed` counts samples of whole steps handed out over all ranks; `wait_seconds` is the time that `next_batches`
    has spent waiting for data.
    """

    def __init__(
        self,
        dataset: Blend,
        *,
        micro_batch_size: int,
        microbatches: int | Callable[[int], int],
        data_rank: int = 0,
        data_size: int = 1,
        consumed: int = 0,
        isolated: bool = False,
        eod: int,
        vocab_size: int,
        num_workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        """`prefetch` steps are read ahead; `vocab_size` bounds every token.

        `microbatches` per step and rank: a number, or a function of the steps that this stream has given before.
        """
        self.dataset = dataset
        self.consumed = consumed
        self.wait_seconds = 0.0
        self._given = 0
        self._rows = micro_batch_size * data_size
        self._microbatches: Callable[[int], int] = microbatches if callable(microbatches) else lambda step: microbatches
        order = _Order(len(dataset), consumed, micro_batch_size, self._microbatches, data_rank, data_size)
        collate = _Collate(isolated, eod, vocab_size, dataset.name)
        self._queue: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(maxsize=max(prefetch, 1))
        self._stop = threading.Event()
        if num_workers:
            loader: Any = DataLoader(dataset, batch_sampler=order, num_workers=num_workers, collate_fn=collate)
        else:
            loader = (collate([dataset[i] for i in indices]) for indices in order)
        forked = threading.Event()
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(loader, self._microbatches, self._queue, self._stop, forked),
            daemon=True,
            name="samples",
        )
        self._thread.start()
        # Processes are forked here and at no other time. One that is forked while the caller starts a subprocess keeps
        # the write end of the pipe on whose end the caller then waits: for ever.
        forked.wait()
        # The thread holds no reference to the stream: dropping the stream ends it.
        self._finalizer = weakref.finalize(self, self._stop.set)

    def next_batches(self) -> list[Batch]:
        """The microbatches of the next step.

        Raises DataError when the data is used up or holds a token outside the vocabulary.
        """
        start = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, list):
            self.consumed += len(item) * self._rows
            self._given += 1
            return item
        self._queue.put(item)  # the thread has ended; the next call gets the same answer
        if item is None:
            raise DataError(
                f"{self.dataset.name} data is used up: {len(self.dataset)} samples, {self.consumed} consumed, "
                f"{self._microbatches(self._given) * self._rows} wanted"
            )
        raise item

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume from here; see `check_resume`."""
        return {"consumed": self.consumed, "identity": self.dataset.identity}

    def close(self) -> None:
        """End the thread and the loader processes."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)


def _read_ahead(
    loader: Any,
    microbatches: Callable[[int], int],
    results: queue.Queue[list[Batch] | BaseException | None],
    stop: threading.Event,
    forked: threading.Event,
) -> None:
    def hand_over(item: list[Batch] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    batches: Any = None
    try:
        try:
            batches = iter(loader)  # starts its processes
        finally:
            forked.set()
        step: list[Batch] = []
        given = 0
        for batch in batches:
            step.append(batch)
            if len(step) == microbatches(given):
                hand_over(step)
                step, given = [], given + 1
            if stop.is_set():
                return
        hand_over(None)
    except Exception as error:  # noqa: BLE001 - raised again by next_batches in the reader's thread
        hand_over(in_one_line(error, getattr(batches, "_workers", [])))


class _Order:
    """Indices of this rank's microbatches, whole steps only."""

    def __init__(
        self, size: int, consumed: int, mbs: int, microbatches: Callable[[int], int], rank: int, ranks: int
    ) -> None:
        self.size, self.consumed, self.mbs = size, consumed, mbs
        self.microbatches, self.rank, self.ranks = microbatches, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed
        for number in itertools.count():
            microbatches = self.microbatches(number)
            stop = start + microbatches * self.ranks * self.mbs
            if stop > self.size:
                return
            for m in range(microbatches):
                first = start + (m * self.ranks + self.rank) * self.mbs
                yield list(range(first, first + self.mbs))
            start = stop


class _Collate:
    """Samples to a microbatch; a class so that loader processes can be sent it."""

    def __init__(self, isolated: bool, eod: int, vocab_size: int, name: str) -> None:
        self.isolated, self.eod, self.vocab_size, self.name = isolated, eod, vocab_size, name

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> Batch:
        tokens = torch.stack([sample["tokens"] for sample in samples])
        labels = torch.stack([sample["labels"] for sample in samples])
        loss_mask = torch.stack([sample["loss_mask"] for sample in samples])
        highest = int(torch.maximum(tokens.max(), labels.max()))
        if highest >= self.vocab_size:
            raise DataError(f"{self.name} data holds token {highest}, outside the vocabulary of {self.vocab_size}")
        if not self.isolated:
            return Batch(tokens=tokens, labels=labels, loss_mask=loss_mask, documents=None)
        # The first token of a document cannot be told from the end of the one before: no loss there.
        loss_mask = loss_mask * (tokens != self.eod)
        documents = [document_starts(row, self.eod) for row in tokens]
        return Batch(tokens=tokens, labels=labels, loss_mask=loss_mask, documents=documents)


def document_starts(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Cumulative document starts [0, …, s], int32, of one row [s]: a document begins after each `eod`."""
    ends = torch.nonzero(tokens == eod).flatten() + 1
    edges = torch.cat([torch.zeros(1, dtype=ends.dtype), ends, torch.full((1,), len(tokens), dtype=ends.dtype)])
    return torch.unique_consecutive(edges).to(torch.int32)
