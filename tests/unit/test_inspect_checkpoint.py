"""tools/inspect_checkpoint.py: what it prints of a checkpoint, and one line for what is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from oryx_megatron.checkpoint.inspect import Entry, summarize, tree
from oryx_megatron.checkpoint.manifest import Manifest, file_digest, write_manifest
from oryx_megatron.config import to_dict
from oryx_megatron.errors import CheckpointError
from oryx_megatron.testing.layouts import tiny_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as megatron-core writes it, of a few tensors."""
    folder = tmp_path / "checkpoints" / "iteration_0000007"
    weights = {
        "decoder.layers.in_proj.weight.key": torch.zeros(2, 8, 4, dtype=torch.bfloat16),
        "decoder.layers.in_proj.weight.value": torch.zeros(2, 16, 4, dtype=torch.bfloat16),
        "embedding.weight": torch.zeros(10, 4),
    }
    state = weights | {f"optimizer.state.exp_avg.{name}": tensor.float() for name, tensor in weights.items()}
    save(state, storage_writer=FileSystemWriter(str(folder)), no_dist=True)
    files = {path.name: file_digest(path) for path in folder.iterdir()}
    layout = {"tp": 2, "pp": 1, "vpp": 1, "cp": 1, "dp": 2}
    write_manifest(folder, Manifest(7, 28, to_dict(tiny_run()), layout, {}, {}, [], {}, None, files))
    return folder


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "inspect_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_parts_sum_tensors_elements_and_bytes(checkpoint: Path) -> None:
    summary = summarize(checkpoint)
    weights, elements = 2 * 24 * 4 + 40, 2 * 24 * 4 * 2 + 40 * 4
    assert summary.parts() == {"model": (3, weights, elements), "optimizer.exp_avg": (3, weights, weights * 4)}
    assert summary.file_bytes == sum(path.stat().st_size for path in checkpoint.iterdir())
    entry = next(e for e in summary.entries if e.name == "decoder.layers.in_proj.weight.value")
    assert entry == Entry(entry.name, (2, 16, 4), "bfloat16", 1, 256)


def test_tree_joins_names_that_do_not_branch() -> None:
    entries = tuple(Entry(name, (2,), "float32", 1, 8) for name in ("a.b.c", "a.b.d.e", "f.g"))
    assert [(level, name, len(group)) for level, name, group in tree(entries)] == [
        (0, "a.b", 2),
        (1, "c", 1),
        (1, "d.e", 1),
        (0, "f.g", 1),
    ]
    assert [name for _, name, _ in tree(entries, depth=1)] == ["a.b", "f.g"]


def test_the_tool_tells_run_iteration_and_tensors(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    shown = _tool(run).stdout
    assert "iteration 7, 28 samples read" in shown
    assert "tiny-gdn" in shown
    assert "2 × 16 × 4" in shown
    assert "exp_avg." not in shown
    data = json.loads(_tool(run, "--json").stdout)
    assert data["tensors"]["embedding.weight"] == {"shape": [10, 4], "dtype": "float32", "shards": 1, "bytes": 160}
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    damaged = _tool(run, "--verify")
    assert damaged.returncode == 2
    assert damaged.stderr.splitlines()[-1].startswith("error: ")
    assert "__0_0.distcp" in damaged.stderr


def test_damaged_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        summarize(checkpoint)
