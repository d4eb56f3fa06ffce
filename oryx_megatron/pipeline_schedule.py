"""When each pipeline rank works on which microbatch: megatron-core's schedules, to count and to draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One pass of one model chunk in the pipeline's schedule; times in units of a forward pass of a stage."""

    rank: int
    chunk: int
    microbatch: int
    forward: bool
    start: float
    stop: float


def schedule(pp: int, vpp: int, microbatches: int) -> list[Slot]:
    """megatron-core's schedule, 1F1B or interleaved, when a backward pass takes twice a forward one.

    ValueError when vpp is above 1 and the microbatches do not come in groups of pp.
    """
    if vpp > 1 and microbatches % pp:
        raise ValueError(f"{microbatches} microbatches are not groups of {pp}")
    orders = [_order(rank, pp, vpp, microbatches) for rank in range(pp)]
    done: dict[tuple[int, int, bool], float] = {}  # (stage of all chunks, microbatch, forward) -> when
    free, next_up = [0.0] * pp, [0] * pp
    slots: list[Slot] = []
    last = pp * vpp - 1
    while any(i < len(order) for i, order in zip(next_up, orders)):
        moved = False
        for rank, order in enumerate(orders):
            while next_up[rank] < len(order):
                chunk, microbatch, forward = order[next_up[rank]]
                stage = chunk * pp + rank
                if forward:
                    need = (stage - 1, microbatch, True) if stage else None
                else:
                    need = (stage + 1, microbatch, False) if stage < last else (stage, microbatch, True)
                if need is not None and need not in done:
                    break
                start = max(free[rank], 0.0 if need is None else done[need])
                stop = start + (1.0 if forward else 2.0) / vpp
                free[rank] = done[stage, microbatch, forward] = stop
                slots.append(Slot(rank, chunk, microbatch, forward, start, stop))
                next_up[rank] += 1
                moved = True
        if not moved:
            raise ValueError("the schedule waits for itself")
    return slots


def _order(rank: int, pp: int, vpp: int, microbatches: int) -> list[tuple[int, int, bool]]:
    """What one rank does, in order: (chunk, microbatch, forward)."""
    total = microbatches * vpp

    def piece(i: int, forward: bool) -> tuple[int, int, bool]:
        if vpp == 1:
            return 0, i, forward
        chunk = i % (pp * vpp) // pp
        return chunk if forward else vpp - 1 - chunk, i // (pp * vpp) * pp + i % pp, forward

    warm = min(total, pp - rank - 1 if vpp == 1 else (pp - rank - 1) * 2 + (vpp - 1) * pp)
    order = [piece(i, True) for i in range(warm)]
    for i in range(warm, total):
        order += [piece(i, True), piece(i - warm, False)]
    return order + [piece(i, False) for i in range(total - warm, total)]
