#!/usr/bin/env python3
"""The whole way on one machine without a GPU: corpus → tokens → train → evaluate → resume → text → picture.

    python tools/quickstart.py
    python tools/quickstart.py train.iterations=20 --stop 10 --copy-steps 20

Run by `make quickstart`. Every step is a command you can run yourself; each is printed before it runs. On source code a
model this small learns equally well in both modes; a second, smaller one learns to copy, where attention pays.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import json
import os
import random
import shlex
import string
import subprocess
import sys
import time
from pathlib import Path

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.data.files import replacing
from oryx_megatron.paths import expand_arguments

ROOT = Path(__file__).resolve().parent.parent
CONFIG, TOKENIZER = "configs/run/quickstart.yaml", "tokenizers/stdlib-8k"
PROMPT = "def read_lines(path):\n"
COPIES = "configs/run/copies.yaml"
STRINGS, LENGTHS, LINE = 16_000, (4, 6, 8, 12, 16, 24, 32, 48), 95
"""Lines of the copying task, characters of the strings that they repeat, and characters of a line."""
REPEATED = "q7Xw9aZk2LmP" * 3
"""Continued by the model that learned to copy."""
COPY_STEPS = 240
"""As in COPIES."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run all steps; stops at the first that fails, with its exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", default="runs/quickstart", help="run folder; numbered when it exists")
    parser.add_argument("--data", default="data/stdlib", help="prefix of the tokens; made when missing")
    parser.add_argument("--stop", type=int, default=100, help="step to stop and resume at (default: %(default)s)")
    parser.add_argument("--copy-steps", type=int, default=COPY_STEPS, help="of the copying task (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes of " + CONFIG)
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
    copies = _unused(run.with_name(f"{run.name}-copies"))
    copying(Path(arguments.data).parent, copies, arguments.copy_steps)
    picture = run / "curves.png"
    step("6. A picture of both runs", [sys.executable, "tools/plot_run.py", str(run), str(copies), "--beside",
         "--panels", "plans", "share", "--names", "source code", "copying", "--out", str(picture)])  # fmt: skip
    summary(run, copies, arguments.data, picture, time.monotonic() - started)
    return 0


def copying(folder: Path, run: Path, steps: int) -> None:
    """Train on strings that repeat themselves: what comes next stands some characters back, if one can look there."""
    text, tokenizer, data = folder / "copies.txt", folder / "bytes", folder / "copies"
    print(f"\n5. Where attention pays: copying\n{text}: {STRINGS:,} lines, each a random string over and over")
    write_copies(text)
    if not (tokenizer / "manifest.json").exists():
        step("   … its characters as tokens", [sys.executable, "tools/train_tokenizer.py", "--input", str(text),
             "--kind", "byte-level", "--vocab-size", "258", "--held-out", "0", "--output", str(tokenizer)])  # fmt: skip
    if not data.with_suffix(".json").exists():
        step("   … the lines as documents", [sys.executable, "tools/preprocess_data.py", "--input", str(text),
             "--separator", r"\n", "--tokenizer", str(tokenizer), "--output", str(data)])  # fmt: skip
    settings = [f"output_dir={run}", f"data.tokenizer={tokenizer}", f"data.blend=[{data}]"]
    if steps != COPY_STEPS:
        settings += [f"train.iterations={steps}", "schedule.warmup=1", "schedule.decay=0"]
    step("   … a model of two layers", [sys.executable, "-m", "oryx_megatron.train", COPIES, *settings])
    for title, plan in (
        ("   … it continues a string by attention", "attention"),
        ("   … by the recurrence", "recurrent"),
    ):
        step(title, [sys.executable, "tools/generate.py", str(run), "--prompt", REPEATED, "--plan",
             f"prompt:recurrent,new:{plan}", "--new-tokens", "24", "--temperature", "0"])  # fmt: skip


def write_copies(path: Path) -> None:
    """The lines of the copying task; the same on every machine."""
    rng, letters, lines = random.Random(0), string.ascii_letters + string.digits, []
    for _ in range(STRINGS):
        once = "".join(rng.sample(letters, rng.choice(LENGTHS)))
        lines.append((once * LINE)[:LINE])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def step(title: str, command: list[str]) -> None:
    """Print what is done, do it, and leave on failure."""
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"\n{title}\n$ {shlex.join(shown)}", flush=True)
    started = time.monotonic()
    if code := subprocess.run(command, check=False).returncode:
        print(f"\nerror: this step failed with exit code {code}; its messages are above", file=sys.stderr)
        sys.exit(code)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def summary(run: Path, copies: Path, data: str, picture: Path, seconds: float) -> None:
    """What was learned, where things are, what to try next."""
    print(f"\nDone in {seconds / 60:.1f} minutes. Loss on held-out text, in nats per token:")
    for name, folder in (("source code", run), ("copying", copies)):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        first = next(line["loss"] for line in lines if line["kind"] == "step")
        last = max(line["iteration"] for line in lines)
        print(f"{name}, after {last} steps; the loss of the first was {first:.2f}")
        for line in lines:
            if line["kind"] == "evaluation" and line["iteration"] == last:
                print(f"  {line['plan']:<12} {line['loss']:.2f}  ({1 - line['loss'] / first:.0%} lower)")
    print(
        f"""
Where things are
  {f"{run}/checkpoints":<32} checkpoints, each with a manifest.json
  {f"{run}/metrics.jsonl":<32} every step and evaluation
  {f"{run}/tensorboard":<32} the same for TensorBoard
  {picture!s:<32} the picture: source code beside copying
  {f"{data}.bin, .idx, .json":<32} the tokens

What to try next
  oryx monitor {run} {copies} --web
  oryx generate {run} --prompt "class " \\
      --plan prompt:attention,new:recurrent
  oryx arch 1.4b-gdn
  oryx train configs/run/pretrain-130m-gdn.yaml \\
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
