"""Weights of a Hugging Face folder come whole and from one place, or not at all."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oryx_megatron.errors import ConversionError
from oryx_megatron.hf.tensors import SafetensorsReader

TENSORS = {
    "a": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "b": torch.arange(11).to(torch.bfloat16),
    "c": torch.tensor(2.5, dtype=torch.float64),
}


def sharded(folder: Path, *shards: dict[str, torch.Tensor]) -> None:
    """Shards and their index."""
    places = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{number}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


class Slow(io.FileIO):
    """A file of which one call reads a few bytes, as Linux reads no more than 2 GiB."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:3])


def test_a_tensor_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    reader = SafetensorsReader(tmp_path)
    opening = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering=-1: Slow(path) if not buffering else opening(path))
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)
    size = path.stat().st_size
    last = next(name for name, tensor in TENSORS.items() if reader._entries[name][3] + tensor.nbytes == size)
    with opening(path, "r+b") as file:
        file.truncate(size - 1)  # after its header was read
    with pytest.raises(ConversionError, match=rf"model\.safetensors is damaged \({last}: it ends too early\)"):
        reader.read(last)


def test_one_place_for_every_tensor(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": TENSORS["a"]}, {"b": TENSORS["b"]})
    assert SafetensorsReader(tmp_path).shapes() == {"a": (5, 7), "b": (11,)}
    sharded(tmp_path, {"a": TENSORS["a"], "c": TENSORS["c"]}, {"b": TENSORS["b"], "a": 2 * TENSORS["a"]})
    with pytest.raises(ConversionError, match=r"a stands in model-0\.safetensors and in model-1\.safetensors; remove"):
        SafetensorsReader(tmp_path)
    sharded(tmp_path, TENSORS)
    save_file({"a": 2 * TENSORS["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(
        ConversionError, match=r"holds model\.safetensors and .*index\.json, two sets of weights; remove"
    ):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_numbers(tmp_path: Path, value: float) -> None:
    broken = TENSORS["a"].clone()
    broken[3, 2] = value
    save_file(TENSORS | {"a": broken}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    assert torch.equal(reader.read("b"), TENSORS["b"])
    with pytest.raises(ConversionError, match=r"model\.safetensors: a holds values that are not finite"):
        reader.read("a")
