"""Files made to run code: none does. What a trainer resumes from is in tests/distributed/test_faults.py."""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import FileSystemWriter, save

from oryx_megatron import compat, monitor
from oryx_megatron.checkpoint import safe
from oryx_megatron.checkpoint.inspect import summarize
from oryx_megatron.checkpoint.manifest import Manifest, file_digest, write_manifest
from oryx_megatron.config import load_run, to_dict
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.data.indexed import read_index
from oryx_megatron.data.loader import build_datasets
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import CheckpointError, ConfigError, DataError
from oryx_megatron.hf.tensors import CheckpointReader
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.testing.project import tiny_project


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What must not exist at the end; that it would is shown first."""
    path = tmp_path / "bomb"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.is_dir()
    path.rmdir()
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "iteration_0000007"
    save({"embedding.weight": torch.zeros(10, 4)}, storage_writer=FileSystemWriter(str(folder)), no_dist=True)
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Whoever puts in a hostile file can also put its checksum into the manifest."""
    files = {path.name: file_digest(path) for path in folder.iterdir() if path.name != "manifest.json"}
    layout = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}
    write_manifest(folder, Manifest(7, 28, to_dict(tiny_run()), layout, {}, {}, [], {}, None, files))


@pytest.mark.parametrize("read", [safe.read_metadata, summarize, CheckpointReader], ids=lambda read: read.__name__)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_metadata(checkpoint: Path, marker: Path, read: Callable[[Path], object], protocol: int) -> None:
    read(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb(marker), protocol))
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged or hostile \(it names .*mkdir, ") as error:
        read(checkpoint)
    assert "\n" not in str(error.value)
    # Nor may a class that is allowed be a way to others: attributes of modules are not classes.
    for name in ("os.system", "Metadata.__init__.__globals__"):
        hostile = pickle.dumps("x")[:-1] + b"0ctorch.distributed.checkpoint.metadata\n" + name.encode() + b"\n."
        (checkpoint / ".metadata").write_bytes(hostile)
        with pytest.raises(CheckpointError):
            safe.read_metadata(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"not": "metadata"}))
    with pytest.raises(CheckpointError, match="holds no metadata"):
        safe.read_metadata(checkpoint)
    assert not marker.exists()


def test_metadata_of_every_kind_is_read(checkpoint: Path) -> None:
    """What torch itself reads is read alike."""
    from torch.distributed.checkpoint import FileSystemReader

    ours, theirs = safe.read_metadata(checkpoint), FileSystemReader(str(checkpoint)).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_common_file(checkpoint: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # not even then
    torch.save({"optimizer": Bomb(marker)}, checkpoint / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt is damaged or hostile \(it names posix\.mkdir"):
        safe.read_common(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["object", "bytes", "tensor", "tensor of torch.save", "storage"])
def test_pickles_in_small_objects_run_nothing(marker: Path, form: str) -> None:
    """As themselves, and as the extra state of a layer, which TransformerEngine unpickles."""
    bomb = pickle.dumps(Bomb(marker))
    saved = io.BytesIO()
    torch.save(Bomb(marker), saved)

    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (saved.getvalue(),)

    value: Any = {
        "object": Bomb(marker),
        "bytes": io.BytesIO(bomb),
        "tensor": torch.frombuffer(bytearray(bomb), dtype=torch.uint8),
        "tensor of torch.save": torch.frombuffer(bytearray(saved.getvalue()), dtype=torch.uint8),
        "storage": io.BytesIO(pickle.dumps(Storage())),
    }[form]
    data = io.BytesIO()
    torch.save([value], data)
    data.seek(0)
    with pytest.raises(CheckpointingException, match=r"its object layer is damaged or hostile \(it names "):
        safe.load_object(data, "layer")
    assert not marker.exists()


def test_deepspeed_files(tmp_path: Path, marker: Path) -> None:
    """What DeepSpeed keeps is read; anything else is not, nor what hides in a layer's extra state."""
    from oryx_megatron.train import deepspeed

    compat.deepspeed.import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class Engine:
        """As much of DeepSpeed's as reads a file."""

        checkpoint_engine = type("CheckpointEngine", (), {})()
        optimizer = basic_optimizer = torch.optim.SGD([torch.zeros(1)])

        def load_checkpoint(self, root: str, tag: str) -> tuple[str, Any]:
            self.optimizer.clip_grad = 2.0  # as ZeRO 1 and 2 do with that of the file
            path = f"{root}/{tag}/mp_rank_00_model_states.pt"
            return path, self.checkpoint_engine.load(path, map_location="cpu")

    path = tmp_path / "iteration_0000001" / "mp_rank_00_model_states.pt"
    path.parent.mkdir()
    usual = {
        "optimizer_state_dict": {"loss_scaler": LossScaler(2.0), "zero_stage": ZeroStageEnum(2)},
        "slices": OrderedDict(weight=fragment_address(3, 4)),
        "module": {"weight": torch.ones(2), "layer._extra_state": torch.empty(0, dtype=torch.uint8)},
    }
    torch.save(usual, path)
    engine = Engine()
    engine.optimizer.clip_grad = 1.0
    deepspeed.restore(engine, path.parent)
    assert engine.optimizer.clip_grad == 1.0
    read = deepspeed.load_file(path)
    assert read["optimizer_state_dict"]["loss_scaler"].cur_scale == 2.0
    assert read["optimizer_state_dict"]["zero_stage"] is ZeroStageEnum(2)
    assert read["slices"]["weight"] == fragment_address(3, 4)
    inner = torch.frombuffer(bytearray(pickle.dumps(Bomb(marker))), dtype=torch.uint8)
    for hostile in (Bomb(marker), usual | {"x": Bomb(marker)}, {"module": {"layer._extra_state": inner}}):
        torch.save(hostile, path)
        with pytest.raises(CheckpointError, match=r"model_states\.pt is damaged or hostile \(it names posix.mkdir"):
            deepspeed.restore(Engine(), path.parent)
    assert not marker.exists()


def _delayed_scaling(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A pickle that names the classes of TransformerEngine's delayed scaling, which is not installed here."""

    class Format(enum.Enum):
        HYBRID = 1

    class TEDelayedScaling:
        fp8_format = Format.HYBRID

    recipe = TEDelayedScaling()
    recipe.__dict__ |= {"margin": 0, "fp8_format": Format.HYBRID}
    with monkeypatch.context() as patch:
        for name, found in (
            ("transformer_engine.common.recipe", Format),
            ("megatron.core.extensions.transformer_engine", TEDelayedScaling),
        ):
            found.__module__, found.__qualname__ = name, found.__name__
            module = ModuleType(name)
            setattr(module, found.__name__, found)
            patch.setitem(sys.modules, name, module)
        for parent in ("transformer_engine", "transformer_engine.common"):
            patch.setitem(sys.modules, parent, ModuleType(parent))
        return pickle.dumps({"recipe": recipe, "scale_fwd": torch.ones(3)})


def test_harmless_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers do keep: nothing, empty tensors, and scales in a dictionary, with the recipe that made them."""
    scales = {"scale": torch.ones(3), "amax_history": torch.zeros(4, 3), "extra_fp8_variables": {"eval": True}}
    pickled = torch.frombuffer(bytearray(pickle.dumps(scales)), dtype=torch.uint8)
    recipe = torch.frombuffer(bytearray(_delayed_scaling(monkeypatch)), dtype=torch.uint8)
    saved = io.BytesIO()
    torch.save(scales, saved)
    for value in (None, torch.empty(0, dtype=torch.uint8), pickled, recipe, io.BytesIO(saved.getvalue()), io.BytesIO()):
        data = io.BytesIO()
        torch.save([value], data)
        data.seek(0)
        (loaded,) = safe.load_object(data, "layer")
        assert type(loaded) is type(value)


def test_yaml(tmp_path: Path, marker: Path) -> None:
    tags = (
        f"!!python/object/apply:os.mkdir ['{marker}']",
        f"!!python/object/new:os.mkdir ['{marker}']",
        "!!python/name:os.system ''",
        "!!python/module:os ''",
    )
    for tag in tags:
        with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
            parse_yaml(f"train: {tag}", "run.yaml")
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: x\nmodel: {tag}\n")
        with pytest.raises(ConfigError, match=r"run\.yaml, line 2"):
            load_run(path)
        path.write_text("output_dir: x\n")
        with pytest.raises(ConfigError, match="override"):
            load_run(path, [f"seed={tag}"])
        (tmp_path / "config.yaml").write_text(f"train: {tag}\n")
        assert monitor.main([str(tmp_path), "--once"], io.StringIO()) == 0
    assert not marker.exists()


def test_datasets(tmp_path: Path, marker: Path) -> None:
    """An index that is a pickle, and cached arrays that are: megatron-core reads those with allow_pickle."""
    config = tiny_project(tmp_path)
    run = load_run(config)
    tokenizer = load_tokenizer(run.data.tokenizer)
    expected = build_datasets(run, tokenizer)["train"][0]["tokens"]
    cached = sorted((tmp_path / ".cache").rglob("*.npy"))
    assert cached
    numbers = {path: path.read_bytes() for path in cached}
    array = io.BytesIO()
    np.save(array, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    for hostile in (pickle.dumps(Bomb(marker)), array.getvalue()):
        for path in cached:
            path.write_bytes(hostile)
            complete = path.with_name("complete.json")
            content = json.loads(complete.read_text())
            content["files"][path.name] = len(hostile)
            complete.write_text(json.dumps(content))
        assert torch.equal(build_datasets(run, tokenizer)["train"][0]["tokens"], expected)
        assert {path: path.read_bytes() for path in cached} == numbers  # made anew
    for content in (pickle.dumps(Bomb(marker)), array.getvalue(), b"MMIDIDX\x00\x00" + pickle.dumps(Bomb(marker))):
        (tmp_path / "data.idx").write_bytes(content)
        with pytest.raises(DataError, match=r"data\.idx"):
            read_index(tmp_path / "data.idx")
        with pytest.raises(DataError, match=r"data\.idx"):
            build_datasets(run, tokenizer)
    assert not marker.exists()
