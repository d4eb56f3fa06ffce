"""Whether the weights in a checkpoint are those of its optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def compare_masters(folder: Path) -> tuple[int, list[str]]:
    """How many weights of a checkpoint have an fp32 master beside them, and which are not that master, rounded."""
    reader = FileSystemReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    compared, apart = 0, []
    for name, weight in tensors.items():
        for kind in ("param", "fp32_param"):  # of a sharded optimizer, and of a whole one
            master = tensors.get(f"optimizer.state.{kind}.{name}")
            if master is not None:
                compared += 1
                apart += [] if torch.equal(weight, master.to(weight.dtype)) else [name]
    return compared, apart
