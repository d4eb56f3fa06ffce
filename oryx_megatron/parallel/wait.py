"""Ranks that work alone or each for itself, and the error of one, which is that of all.

Where one rank works the others wait for as long as it takes: no collective's time limit ends them.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import DistNetworkError, DistStoreError, distributed_c10d

from oryx_megatron.errors import OryxError, first_line

T = TypeVar("T")
BEAT = 5.0
"""Seconds between signs of life of rank 0."""
LIFE = 3600.0
"""Seconds without one after which the others give up. Long: shuffling a large index keeps Python's lock for minutes,
and a rank 0 that died is its launcher's to notice."""
_calls = itertools.count()


def first_rank_alone(
    work: Callable[[], T], what: str, error: type[OryxError], *, beat: float = BEAT, life: float = LIFE
) -> T:
    """Do `work` on rank 0; its result, which must be JSON, or its error is that of every rank.

    All ranks must call it. Without torch.distributed this process does the work.

    Args:
        work: Raises OryxError for what the user can fix.
        what: For the error of a rank 0 that died, as in `builds sample indices`.
        error: Class of what the other ranks raise.
        beat: Seconds between signs of life.
        life: Seconds without one after which the other ranks raise.

    Raises:
        OryxError: what `work` raised on rank 0, or rank 0 did not report.
    """
    if not torch.distributed.is_initialized():
        return work()
    name, store = f"oryx/first rank/{next(_calls)}", distributed_c10d._get_default_store()
    if torch.distributed.get_rank() == 0:
        return _work(work, name, store, beat)
    seen = None
    while True:
        try:
            store.wait([f"{name}/done"], timedelta(seconds=life))
            break
        except DistStoreError as timeout:
            beats = store.add(f"{name}/beats", 0)
            if beats == seen:
                # Of this rank: rank 0 prints nothing any more.
                raise error.of_one_rank(f"rank 0, which {what}, did not report for {life:.0f} s") from timeout
            seen = beats
        except DistNetworkError as lost:
            raise error.of_one_rank(f"rank 0, which {what}, is gone: {first_line(lost)}") from lost
    answer = json.loads(store.get(f"{name}/done"))
    store.add(f"{name}/read", 1)
    if "error" in answer:
        raise error(answer["error"])
    return answer["value"]


def on_all_ranks(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, when all ranks call it.

    Raises:
        OryxError: what `work` raised on the first rank on which it did.
    """
    mine: OryxError | None = None
    try:
        result = work()
    except OryxError as error:
        mine = error
    found: list[OryxError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    if (first := next(filter(None, found), None)) is not None:
        raise first
    return result


def _work(work: Callable[[], T], name: str, store: Any, beat: float) -> T:
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(beat):
            store.add(f"{name}/beats", 1)

    thread = threading.Thread(target=live, daemon=True, name="beats of rank 0")
    thread.start()
    try:
        value = work()
    except BaseException as error:
        why = str(error) if isinstance(error, OryxError) else f"rank 0 failed: {type(error).__name__}: {error}"
        store.set(f"{name}/done", json.dumps({"error": why}))
        _await_readers(name, store)
        raise
    finally:
        ended.set()
        thread.join()
    store.set(f"{name}/done", json.dumps({"value": value}))
    return value


def _await_readers(name: str, store: Any, seconds: float = 20.0) -> None:
    """Stay until all ranks have read an error: this process may be the one that serves the store, and ends by it."""
    deadline = time.monotonic() + seconds
    others = torch.distributed.get_world_size() - 1
    while store.add(f"{name}/read", 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)
