"""Process groups: torch.distributed and megatron-core's parallel state, from a layout."""

from oryx_megatron.parallel.context import heads_to_sequence, sequence_to_heads
from oryx_megatron.parallel.groups import destroy, exist, hold, initialize, is_main_rank, release, start_name

__all__ = [
    "destroy",
    "exist",
    "heads_to_sequence",
    "hold",
    "initialize",
    "is_main_rank",
    "release",
    "sequence_to_heads",
    "start_name",
]
