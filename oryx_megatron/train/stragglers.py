"""Finding the rank that the others wait for.

In a synchronous step all ranks take the same time; the slow one is the one that does not wait. So each rank measures
the time from the start of the step, its wait for data included, until its own gradients are made and are about to be
reduced, and is compared with its data-parallel peers: the ranks that hold the same part of the model and do the same
work. Ranks of one tensor-, context- or pipeline-parallel group wait for each other inside that time, so all of them
look slow when one is. A time is taken with two events a step; it is exchanged every logging.interval steps.
"""

from __future__ import annotations

import socket
import statistics
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from oryx_megatron import platform

LEAST = 1e-3
"""Seconds that a slow rank must lag behind, so that noise of tiny steps is not told."""


class Stragglers:
    """Measures this rank's part of each step and compares it with its peers'.

    Args:
        chunks: Model chunks whose gradients megatron-core finalizes; those of another engine are not measured.
        threshold: faults.slow_rank; 0 measures nothing.
    """

    def __init__(self, chunks: list[Any], threshold: float) -> None:
        self.threshold = threshold
        self._times: list[Any] = []
        self._begin: Any = None
        self._peers: list[tuple[tuple[int, ...], str]] = []
        config = get_model_config(chunks[0])
        finalize = config.finalize_model_grads_func
        self.active = bool(threshold) and finalize is not None and parallel_state.get_data_parallel_world_size() > 1
        if not self.active:
            return

        def measured(*arguments: Any, **keywords: Any) -> Any:
            if self._begin is not None:
                self._times.append((self._begin, platform.mark()))
                self._begin = None
            return finalize(*arguments, **keywords)

        config.finalize_model_grads_func = measured
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
        )
        self._peers = [((), "")] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(self._peers, (place, socket.gethostname()))

    def start(self) -> None:
        """A step begins."""
        if self.active:
            self._begin = platform.mark()

    def compare(self) -> str | None:
        """Exchange the mean times since the last call, on all ranks; names the slowest if beyond the threshold."""
        if not self.active or not self._times:
            return None
        mine = statistics.fmean(platform.seconds_between(begin, end) for begin, end in self._times)
        self._times.clear()
        seconds = torch.zeros(len(self._peers), dtype=torch.float64, device=platform.device())
        seconds[torch.distributed.get_rank()] = mine
        torch.distributed.all_reduce(seconds)
        return slowest(seconds.tolist(), self._peers, self.threshold)


def slowest(seconds: list[float], peers: list[tuple[tuple[int, ...], str]], threshold: float) -> str | None:
    """The rank that takes most times its peers' time, in words, when that is above `threshold`.

    Args:
        seconds: Time of every rank.
        peers: Place in the model, equal for peers, and host of every rank.
        threshold: Times the median (the lower one of two) of the peers.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, (place, _) in enumerate(peers):
        groups.setdefault(place, []).append(rank)
    found: list[tuple[float, int, float]] = []
    for ranks in groups.values():
        usual = statistics.median_low(seconds[rank] for rank in ranks)
        last = max(ranks, key=lambda rank: seconds[rank])
        if usual > 0 and seconds[last] > threshold * usual and seconds[last] - usual > LEAST:
            found.append((seconds[last] / usual, last, usual))
    if not found:
        return None
    _, rank, usual = max(found)
    return (
        f"rank {rank} ({peers[rank][1]}) is slow: {seconds[rank]:.3f} s for its part of a step, "
        f"its peers take {usual:.3f} s"
    )
