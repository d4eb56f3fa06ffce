"""Which checkpoints of a run are removed, and which files of them: the same on disk and on object storage."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from oryx_megatron.checkpoint.manifest import OWN_FILES, iteration_of

log = logging.getLogger(__name__)


def to_remove(
    names: Iterable[str],
    keep: int,
    keep_every: int,
    *,
    steps: Collection[int],
    best: str | None,
    whole: Callable[[str], bool],
) -> Iterator[str]:
    """Those of a run's checkpoints that retention removes.

    Args:
        names: Of the checkpoints' folders, newest first.
        keep: Whole checkpoints to keep, the newest ones. A damaged one among them stays too, but does not count.
        keep_every: Those at multiples of it stay too; 0: none.
        steps: Those at these iterations stay too.
        best: So does the one of this name, which has the lowest validation loss.
        whole: Whether all files of a checkpoint are there; asked only until `keep` are found.
    """
    kept = 0
    for name in names:
        iteration = iteration_of(Path(name))
        if kept < keep:
            kept += whole(name)
        elif name != best and iteration not in steps and not (keep_every and iteration % keep_every == 0):
            yield name


def is_own_file(name: str, listed: Collection[str]) -> bool:
    """Whether a file belongs to its checkpoint: its manifest lists it, or a run gives files such a name."""
    return name in listed or any(fnmatch.fnmatchcase(name, pattern) for pattern in OWN_FILES)


def warn_once(told: set[str], name: str, place: object, reason: str) -> None:
    """Say that the checkpoint `name`, at `place`, could not be removed, unless it was `told` before."""
    if name not in told:
        log.warning("the old checkpoint %s stays: %s", place, reason)
        told.add(name)
