"""A run on object storage over ranks that share no disk: each has a cache of its own, as on machines of their own."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tiny_runs import close

from oryx_megatron import parallel, platform
from oryx_megatron.config import load_run, validate
from oryx_megatron.storage import Remote
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.project import tiny_project


def train(config: Path, *overrides: str) -> str:
    """Run the Trainer; the name of the machine's folder for the run."""
    from oryx_megatron.train.trainer import Trainer

    run = load_run(config, ["model.num_layers=2", *overrides])
    parallel.initialize(run.parallel, seed=run.seed)
    trainer: Any = None
    try:
        trainer = Trainer(run, validate(run, torch.distributed.get_world_size()))
        trainer.fit()
        close(trainer)
        return str(trainer.folder)
    finally:
        trainer = None
        parallel.release()
        gc.collect()


def on_machines_apart(config: str, url: str, caches: str) -> list[str]:
    """Train here, stop, lose the second machine's disk, resume under another layout; what each cache held."""
    cache = Path(caches, os.environ["RANK"])
    os.environ.update(ORYX_CACHE=str(cache), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    platform.install()
    path = Path(config)
    train(path, f"output_dir={path.parent}/whole")
    tensor = "parallel.tensor=2"
    on = (
        *(f"output_dir={url}", f"data.blend=[{url}-data]", "checkpoint.interval=2", "checkpoint.keep=1"),
        *("checkpoint.asynchronous=true", "data.num_workers=1"),
    )
    train(path, *on, "train.exit_after=3")
    here = sorted(file.name for file in cache.rglob("*") if file.suffix in (".distcp", ".idx"))
    if os.environ["RANK"] == "1":
        shutil.rmtree(cache)
        from oryx_megatron import storage

        storage._held.clear()
    train(path, *on, tensor, "logging.profile=[4, 4]", "logging.profile_ranks=[0, 1]")
    return here


def test_ranks_apart(tmp_path: Path) -> None:
    """Each machine writes its own ranks' files only, and gets the others' when it loads; losses as on one disk."""
    config, url = tiny_project(tmp_path), f"file://{tmp_path}/bucket/run"
    for end in ("bin", "idx"):
        Remote(f"{url}-data.{end}").upload(tmp_path / f"data.{end}")
    here = run_distributed(on_machines_apart, 2, str(config), url, str(tmp_path / "caches"))
    assert here == [["__0_0.distcp", "run-data.idx"], ["__1_0.distcp", "run-data.idx"]]
    read = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (Remote(f"{url}/metrics.jsonl").read() or b"").splitlines()]
    whole, there = ([line["loss"] for line in part if line["kind"] == "step"] for part in (read, lines))
    assert there[:3] == whole[:3]
    torch.testing.assert_close(torch.tensor(there), torch.tensor(whole), rtol=1e-4, atol=0)
    ends = ("trace.json.gz", "txt")  # of the rank on the other machine, too
    assert set(Remote(f"{url}/profile").files()) == {f"rank{rank}-steps4-4.{end}" for rank in (0, 1) for end in ends}
    files = Remote(f"{url}/checkpoints").files()
    assert {name.partition("/")[0] for name in files} == {"iteration_0000006"}
    assert [path.name for path in (tmp_path / "bucket/run/checkpoints").iterdir()] == [
        "iteration_0000006"
    ]  # none empty
    assert {name.partition("/")[2] for name in files} >= {"__0_0.distcp", "__1_0.distcp", "manifest.json", ".metadata"}
