"""The one exchange of a step: attention share and FLOPs, whether the step is bad, whether to stop."""

from __future__ import annotations

import torch

from oryx_megatron import platform
from oryx_megatron.train import signals
from oryx_megatron.train.clock import Clock


class Agreement:
    """What all ranks tell each other at the end of every step, so that all take the same way from there.

    Args:
        request: This rank's notes of signals and time limits.
        clock: How long a step, an evaluation and a save take.
    """

    def __init__(self, request: signals.StopRequest, clock: Clock) -> None:
        self.request, self.clock = request, clock
        self.started = False
        """Whether this process has done a step."""
        self.reason: str | None = None
        """Why to stop after this step."""

    def exchange(self, bad: torch.Tensor, share: float, flops: float) -> torch.Tensor:
        """[3 + REASONS] on the device: ranks that see a bad step, means of `share` and `flops`, votes to stop.

        Every rank of the model counts its own, so the mean over all is that over data-parallel ranks.
        """
        notes = self.request.notes(longest=self.clock.longest_stop, started=self.started)
        own = platform.to_device(torch.tensor([0.0, share, flops, *notes], dtype=torch.float64))
        own[0] = bad
        world = torch.distributed.get_world_size()
        if world > 1:
            torch.distributed.all_reduce(own)
            own[1:3] /= world
        return own

    def conclude(self, exchanged: list[float]) -> tuple[float, float]:
        """Note what `exchange` gave in a step, after its first number; the mean share and FLOPs."""
        self.started = True
        share, flops, *votes = exchanged
        self.reason = signals.decide(votes)
        return share, flops

    def poll(self) -> None:
        """Exchange notes before the first step: a signal may have come while the model was built."""
        _, _, _, *votes = self.exchange(torch.tensor(False), 0.0, 0.0).tolist()
        self.reason = signals.decide(votes)
