"""What a user does with one GPU: train, stop, resume, evaluate, write text, take the model to Hugging Face."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oryx_megatron import platform
from oryx_megatron.testing.project import tiny_project

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "model.num_layers": 2,
    "model.hidden_size": 256,
    "model.ffn_hidden_size": 512,
    "model.qk_head_dim": 128,
    "model.v_head_dim": 128,
    "data.sequence_length": 256,
    "modes.chunk": 64,
    "precision.dtype": "bf16",
    "checkpoint.asynchronous": True,
}


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=400
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize(("mixer", "fp8"), [("gdn", "none"), ("gdn", "delayed"), ("mamba2", "none")])
def test_from_training_to_hugging_face(tmp_path: Path, mixer: str, fp8: str) -> None:
    if fp8 != "none" and (reason := platform.transformer_engine_missing()):
        pytest.skip(reason)
    config = tiny_project(tmp_path)
    settings = [f"{name}={value}" for name, value in SIZES.items()]
    settings += [f"model.mixer={mixer}", f"precision.fp8={fp8}"]
    run = tmp_path / "out"
    command("-m", "oryx_megatron.train", config, *settings, "train.exit_after=4")
    command("-m", "oryx_megatron.train", config, *settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    shown = command("-m", "oryx_megatron.eval", "perplexity", run, "--plans", "attention", "recurrent", "ratio:0.5")
    assert "ratio:0.5" in shown
    command("tools/generate.py", run, "--prompt", "a", "--new-tokens", 8)
    command("tools/convert_to_hf.py", run, tmp_path / "hf", "--verify")
    assert (tmp_path / "hf" / "config.json").is_file()
