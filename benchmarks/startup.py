#!/usr/bin/env python
"""CPU seconds until a command works: imports against `import torch`, and --help, each in new processes, taken in turns.

    python benchmarks/startup.py
    python benchmarks/startup.py --generate RUN

The least of --repeat runs counts: other work on the machine only adds. User and system time of the process and its
children.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = ("megatron.core", "oryx_megatron.train.trainer", "oryx_megatron.eval.generation", "oryx_megatron.hf.convert")
HELPS = (
    "tools/generate.py",
    "tools/plan.py",
    "tools/preprocess_data.py",
    "oryx_megatron.train",
    "oryx_megatron.doctor",
)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--base", default="torch", help="module that others are compared with (default: %(default)s)")
    parser.add_argument("--imports", nargs="*", default=IMPORTS, help="modules to import")
    parser.add_argument("--helps", nargs="*", default=HELPS, help="commands asked for --help: scripts or modules")
    parser.add_argument("--generate", metavar="RUN", help="also 20 tokens of tools/generate.py from this run")
    arguments = parser.parse_args(argv)
    if arguments.repeat < 1:
        raise ConfigError(f"--repeat: {arguments.repeat} should be at least 1")
    base = f"import {arguments.base}"
    cases = {
        f"import {name}": ["-W", "ignore", "-c", f"import {name}"] for name in (arguments.base, *arguments.imports)
    }
    for name in arguments.helps:
        cases[f"{name} --help"] = [*(["-m"] if not name.endswith(".py") else []), name, "--help"]
    if arguments.generate:
        run = str(Path(arguments.generate).resolve())
        cases["tools/generate.py, 20 tokens"] = [
            *("tools/generate.py", run, "--prompt", "the ", "--new-tokens", "20")
        ]  # fmt: skip
    found: dict[str, float] = {}
    for _ in range(arguments.repeat):
        for name, command in cases.items():
            found[name] = min(seconds(command), found.get(name, float("inf")))
    print(f"{'CPU seconds':<44}{'':>7}  of {base}")
    for name, least in found.items():
        print(f"  {name:<42}{least:>7.2f}  {least / found[base]:.2f} ×")
    return 0


def seconds(command: list[str]) -> float:
    """User and system time of a Python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"python {' '.join(command)} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
