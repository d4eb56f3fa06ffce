"""Batch sizes over a run's iterations, and so the number of samples read after so many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oryx_megatron.config.schema import TrainConfig

Sizes = tuple[tuple[int, int], ...]
"""(iteration, samples per step from there on), ascending from 0."""


@dataclass(frozen=True)
class SampleCount:
    """Samples that a run reads in each step, and has read after so many: a function of the iteration alone.

    A checkpoint's manifest records it, so that it stays the same function over resumes, rollbacks and changed configs.
    """

    sizes: Sizes
    iteration: int = 0
    """Where the run begins to count: one that starts from another's checkpoint may not begin at 0."""
    samples: int = 0
    """Samples read when that many steps are done."""

    @classmethod
    def of(cls, train: TrainConfig, iteration: int = 0, samples: int = 0) -> SampleCount:
        """Batch sizes as the config has them, without those of a checkpoint."""
        return cls(planned(train), iteration, samples)

    @classmethod
    def read(cls, sizes: Sequence[Sequence[int]], iteration: int = 0, samples: int = 0) -> SampleCount:
        """Read what a manifest holds: the three fields of `dataclasses.astuple`."""
        return cls(tuple((start, size) for start, size in sizes), iteration, samples)

    def batch_at(self, iteration: int) -> int:
        """Samples of the step after `iteration` steps."""
        return next(size for start, size in reversed(self.sizes) if start <= iteration)

    def samples_at(self, iteration: int) -> int:
        """Samples read when `iteration` steps are done."""
        return self.samples + self._since_zero(iteration) - self._since_zero(self.iteration)

    def continued(self, iteration: int, sizes: Sizes) -> SampleCount:
        """This count with the batch sizes of another from an iteration on."""
        joined = [piece for piece in self.sizes if piece[0] < iteration]
        joined.append((iteration, next(size for start, size in reversed(sizes) if start <= iteration)))
        joined += [piece for piece in sizes if piece[0] > iteration]
        return SampleCount(_merged(joined), self.iteration, self.samples)

    def _since_zero(self, iteration: int) -> int:
        ends = [start for start, _ in self.sizes[1:]]
        pieces = zip(self.sizes, [*ends, iteration], strict=True)
        return sum((min(end, iteration) - start) * size for (start, size), end in pieces if start < iteration)

    def __str__(self) -> str:
        first, *later = self.sizes
        return ", ".join([str(first[1]), *(f"{size} from step {start + 1} on" for start, size in later)])


def planned(train: TrainConfig) -> Sizes:
    """The batch sizes that a config asks for."""
    later = [(stage.start, stage.global_batch_size) for stage in train.batch_schedule]
    return _merged([(0, train.global_batch_size), *later])


def _merged(pieces: Sequence[tuple[int, int]]) -> Sizes:
    """Without pieces of no length, and those that change nothing."""
    by_start = dict(pieces)  # of two at one iteration the later one counts
    merged: list[tuple[int, int]] = []
    for start in sorted(by_start):
        if not merged or merged[-1][1] != by_start[start]:
            merged.append((start, by_start[start]))
    return tuple(merged)
