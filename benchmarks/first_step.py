#!/usr/bin/env python
"""Seconds from the start of a training command to its first step: with an empty kernel cache, then a warm one.

    python benchmarks/first_step.py 1.4b-gdn --sequence 2048 --micro 4 --out OUT

Both are `oryx_megatron.train` on the GPUs at hand (one process), on random tokens, the second in the caches that the
first one left. What lies between start and step is taken from the run's own log.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.data.files import replacing
from oryx_megatron.data.indexed import IndexedWriter
from oryx_megatron.errors import ConfigError
from oryx_megatron.platform import KERNEL_CACHES

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER, VOCABULARY = ROOT / "tokenizers" / "stdlib-8k", 8192
MOMENTS = {
    "TileLang begins to compile": "compiling",
    "graphs: (?:off|microbatches)": "model built",
    "TileLang completes to compile kernel `tilelang_fused_chunk_gdr_bwd": "longest kernel compiled",
    "kernels ready": "kernels ready",
    r"^ *1/\d": "first step",
}
"""What a line of the log says → how it is called here. The last one ends the run."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="preset")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=4, help="sequences of the one microbatch")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="other fields of the run")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds of a run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of first_step.json and of the logs")
    arguments = parser.parse_args(argv)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens", arguments.sequence)
        for cache in ("empty", "warm"):
            seconds, log = first_step(arguments, folder, cache)
            found.append({"cache": cache, **seconds})
            moments = ", ".join(f"{moment} {value:.1f} s" for moment, value in seconds.items())
            print(f"{cache} cache: {moments}", flush=True)
            if arguments.out is not None:
                arguments.out.mkdir(parents=True, exist_ok=True)
                with replacing(arguments.out / f"first-step-{cache}.log") as path:
                    path.write_text(log)
                with replacing(arguments.out / "first_step.json") as path:
                    path.write_text(json.dumps({"date": str(datetime.date.today()), "runs": found}, indent=1))
    return 0


def write_tokens(prefix: Path, sequence: int) -> None:
    """A dataset of random tokens, enough for a few steps."""
    with IndexedWriter(prefix, VOCABULARY) as writer:
        tokens = np.random.default_rng(1).integers(1, VOCABULARY, (64, sequence + 1))
        for row in tokens:
            writer.add(row.astype(writer.dtype), np.array([row.size]))
        writer.finish(None, None)


def first_step(arguments: argparse.Namespace, folder: Path, cache: str) -> tuple[dict[str, float], str]:
    """Seconds since the command began at each of MOMENTS, and the log; ends the run after its first step."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "oryx_megatron.train", str(folder / "run.yaml")),
        f"output_dir={folder / cache}",
        *arguments.set,
    ]
    (folder / "run.yaml").write_text(
        json.dumps(
            {
                "model": arguments.model,
                "output_dir": "given on the command line",
                "data": {
                    "sequence_length": arguments.sequence,
                    "tokenizer": str(TOKENIZER),
                    "blend": [str(folder / "tokens")],
                    "split": [100, 0, 0],
                },
                "train": {
                    "iterations": 2,
                    "global_batch_size": arguments.micro,
                    "micro_batch_size": arguments.micro,
                },
                "schedule": {"warmup": 0},
                "evaluation": {"interval": 1000, "plans": []},
                "checkpoint": {"interval": 1000},
                "kernels": {"cache_dir": str(folder / "cache")},
                "logging": {"interval": 1, "tensorboard": False},
            }
        )
    )
    environment = {key: value for key, value in os.environ.items() if key not in KERNEL_CACHES}
    begun, seconds, lines = time.perf_counter(), dict[str, float](), list[str]()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    timer = threading.Timer(arguments.timeout, process.kill)  # a run that hangs prints no line
    timer.start()
    try:
        for line in process.stdout:
            now = time.perf_counter() - begun
            lines.append(f"{now:7.1f} {line}")
            for pattern, moment in MOMENTS.items():
                if moment not in seconds and re.search(pattern, line):
                    seconds[moment] = now
            if "first step" in seconds:
                break
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    if "first step" not in seconds:
        print("".join(lines[-20:]), file=sys.stderr)
        after = time.perf_counter() - begun
        raise ConfigError(f"{arguments.model}: no first step within {after:.0f} s; its last lines are above")
    return seconds, "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
