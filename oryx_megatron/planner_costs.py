"""What the planner's arithmetic is multiplied by: speeds of cards, hosts and links, fitted to what was measured.

`python benchmarks/planner_error.py` holds them against the kept results of `benchmarks/results` and others that are
given, and `--fit` prints those that fit best.
"""

from __future__ import annotations

from dataclasses import dataclass, field

COPY_TERABYTES = {"h100": 3.0, "h200": 4.27}
"""TB/s that a card copies, read and written."""
MEMORY_GIB = {"h100": 79.0, "h200": 141.0}
"""Of a card."""
PEAK = 989e12
"""FLOP/s of an H100 or H200 (SXM) in bf16, of which shares are meant."""


@dataclass(frozen=True)
class Costs:
    """Constants of speed. Host times are those of the machines that were lent with the cards, 16 cores a GPU."""

    linear_share: float = 0.606
    """Of the peak FLOP rate that a block's matrix products reach."""
    attention_share: float = 0.467
    """Of the peak that attention reaches, forward and backward (cuDNN, 8,192 tokens, 16 heads of 128)."""
    recurrence_seconds: dict[str, float] = field(
        default_factory=lambda: {"gdn": 2.04e-3 / (32768 * 16), "mamba2": 2.17e-3 / (32768 * 16)}
    )
    """Per token and head of 128 × 128 on an H200, forward and backward (flash_qla at 8,192 tokens, our Triton
    kernels)."""
    passes: float = 2.34
    """How many times memory is read and written for each byte that is kept for the backward pass, SwiGLU's output not
    counted; its recompute is."""
    fp8: dict[str, float] = field(
        default_factory=lambda: {"none": 1.0, "tensorwise": 0.74, "delayed": 0.71, "blockwise": 0.81, "mxfp8": 0.81}
    )
    """Time of a block's matrix products, casts included, over that in bf16."""
    launch_seconds: dict[str, float] = field(
        default_factory=lambda: {"gdn": 7.0e-3, "mamba2": 5.5e-3, "attention": 4.2e-3}
    )
    """What the host needs for a layer and microbatch, launched, forward and backward, by recurrence; without one:
    attention alone."""
    launch_experts: float = 36e-3
    """The same for the experts of a layer: routing and exchange, which wait for the host in turns."""
    launch_expert: float = 0.11e-3
    """The same for each expert of a rank: six products."""
    launch_again: float = 0.5
    """Of that, once more for a layer that is recomputed."""
    launch_fp8: float = 1.7
    """By how much casts and scales lengthen that."""
    launched_collective: float = 0.2e-3
    """Of the host for a collective of sequence parallelism, launched."""
    collective: float = 0.05e-3
    """Of a GPU for a collective beside its bytes, while ranks wait for each other."""
    launched_exchange: float = 1.0e-3
    """Of the host for an exchange of context parallelism, launched."""
    exchange: float = 0.3e-3
    """Of a GPU for an exchange of context parallelism beside its bytes."""
    update_bytes: float = 60.0
    """Moved per parameter that a GPU owns: cleared and scaled gradient, its norm, AdamW with master and moments in
    fp32."""
    step_seconds: float = 6e-3
    """Of a step without a kernel: the host reads loss and norm, and begins the next one."""
    offload_seconds: float = 0.96e-9
    """Per parameter that a GPU owns, with `optimizer.cpu_offload` and 16 cores of the host for the GPU."""


COSTS = Costs()
