#!/usr/bin/env python3
"""The whole way on one machine without a GPU: corpus → tokens → train → evaluate → resume → text → picture.

Run by `make quickstart`. Every step is a command you can run yourself; each is printed before it runs.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.paths import expand_arguments

ROOT = Path(__file__).resolve().parent.parent
CONFIG, TOKENIZER = "configs/run/quickstart.yaml", "tokenizers/stdlib-8k"
PROMPT = "def read_lines(path):\n"


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run all steps; stops at the first that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", default="runs/quickstart", help="run folder; numbered when it exists")
    parser.add_argument("--data", default="data/stdlib", help="prefix of the tokens; made when missing")
    parser.add_argument("--stop", type=int, default=100, help="step to stop and resume at (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of " + CONFIG)
    arguments = parser.parse_intermixed_args(argv)
    expand_arguments(arguments, "--output", "--data")
    os.chdir(ROOT)
    started = time.monotonic()
    # Two processes share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    run = _unused(Path(arguments.output))
    train = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "oryx_megatron.train", CONFIG, f"output_dir={run}"),
        *(f"data.blend=[{arguments.data}]", *arguments.overrides),
    ]
    if not all(Path(arguments.data + end).exists() for end in (".bin", ".idx", ".json")):
        title = "1. The corpus: Python's standard library as tokens"
        step(title, [sys.executable, "tools/preprocess_data.py", "--input", "stdlib",
                     "--tokenizer", TOKENIZER, "--output", arguments.data])  # fmt: skip
    else:
        print(f"\n1. The corpus: {arguments.data} is there already")
    step("2. Training on two tensor-parallel processes", [*train, f"train.exit_after={arguments.stop}"])
    step("3. Resuming from the checkpoint", train)
    for title, plan in (
        ("4. Text: prompt read in attention mode, rest written recurrently", "prompt:attention,new:recurrent"),
        ("   … and all of it in attention mode", "attention"),
    ):
        step(title, [sys.executable, "tools/generate.py", str(run), "--prompt", PROMPT, "--plan", plan,
                     "--new-tokens", "60"])  # fmt: skip
    picture = run / "curves.png"
    step("5. A picture of the run", [sys.executable, "tools/plot_run.py", str(run), "--out", str(picture)])
    summary(run, arguments.data, picture, time.monotonic() - started)
    return 0


def step(title: str, command: list[str]) -> None:
    """Print what is done, do it, and leave on failure."""
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"\n{title}\n$ {shlex.join(shown)}", flush=True)
    started = time.monotonic()
    if code := subprocess.run(command, check=False).returncode:
        print(f"\nerror: this step failed with exit code {code}; its messages are above", file=sys.stderr)
        sys.exit(code)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def summary(run: Path, data: str, picture: Path, seconds: float) -> None:
    """What was learned, where things are, what to try next."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line["loss"] for line in lines if line["kind"] == "step")
    last = max(line["iteration"] for line in lines)
    print(f"\nDone in {seconds / 60:.1f} minutes. The loss of the first step was {first:.2f}; after {last} steps:")
    for line in lines:
        if line["kind"] == "evaluation" and line["iteration"] == last:
            drop = 1 - line["loss"] / first
            print(f"  {line['plan']:<12} {line['loss']:.2f}  ({drop:.0%} lower, {line['bits_per_byte']:.2f} bits/byte)")
    print(
        f"""
Where things are
  {f"{run}/checkpoints":<32} checkpoints, each with a manifest.json
  {f"{run}/metrics.jsonl":<32} every step and evaluation
  {f"{run}/tensorboard":<32} the same for TensorBoard
  {picture!s:<32} training loss and the evaluation curves
  {f"{data}.bin, .idx, .json":<32} the tokens

What to try next
  python tools/generate.py {run} --prompt "class " --plan ratio:0.1
  python -m oryx_megatron.arch 1.4b-gdn
  python -m oryx_megatron.train configs/run/pretrain-130m-gdn.yaml \\
      --dry-run --config-only --world-size 64
(with {VENV}/bin first in PATH: source {VENV}/bin/activate)"""
    )


VENV = Path(sys.prefix).name


def _unused(path: Path) -> Path:
    """`path`, or `path-2`, `path-3`, … when it exists: an earlier run is never touched."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


if __name__ == "__main__":
    sys.exit(main())
