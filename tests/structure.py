#!/usr/bin/env python3
"""Draw the package: its parts from ground to roof, lines of code, and who imports whom.

    python tests/structure.py docs/images/structure.svg
    python tests/structure.py before.svg --package ../an-older-checkout/oryx_megatron
    python tests/structure.py --way

Reads the code's own imports, by the rules of tests/unit/test_imports.py. A part stands above all that it imports.
`--way` follows tokens instead: it makes a dataset, trains two steps and exports, and lists the files of the package
with a function that was given or gave an array meanwhile.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "unit"))
from test_imports import ORDER, PACKAGE, imports, modules, part

ENDS = {"SHARED": "hf (torch alone)", "PURE": "hf (pure Python)", "MAINS": "commands"}


def measure(package: Path) -> tuple[Counter[str], Counter[tuple[str, str]], dict[str, int]]:
    """Lines of each part, number of importing files of each pair of parts, and lines of each file."""
    known = modules(package)
    lines: Counter[str] = Counter()
    arrows: Counter[tuple[str, str]] = Counter()
    files = {}
    for name, path in known.items():
        if not name:
            continue
        text = path.read_text(encoding="utf-8")
        files[str(path.relative_to(package))] = len(text.splitlines())
        lines[part(name)] += len(text.splitlines())
        targets = set()
        for _, target in imports(ast.parse(text), path, package):
            top, _, inner = target.partition(".")
            while top == package.name and inner and inner not in known:
                inner = inner.rpartition(".")[0]
            if top == package.name and inner:
                targets.add(part(inner))
        arrows.update((part(name), other) for other in targets if other != part(name))
    return lines, arrows, files


def floors(lines: Counter[str], arrows: Counter[tuple[str, str]]) -> dict[str, int]:
    """The floor of each part: one above the highest that it imports."""
    found: dict[str, int] = {}
    for name in (name for name in ORDER if name in lines):
        below = [found[other] for a, other in arrows if a == name and other in found]
        found[name] = max(below, default=-1) + 1
    return found


def direct(arrows: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The arrows that no way over other parts implies."""
    below: dict[str, set[str]] = {name: set() for name in ORDER}
    for name in ORDER:  # all that a part imports comes before it
        for a, b in arrows:
            if a == name:
                below[name] |= {b} | below[b]
    return {
        (a, b): count
        for (a, b), count in arrows.items()
        if not any(b in below[other] for x, other in arrows if x == a and other != b)
    }


def draw(package: Path, output: Path) -> None:
    """Boxes whose width is their lines, on floors; an arrow's width is the number of files that import."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    lines, arrows, files = measure(package)
    levels = floors(lines, arrows)
    figure = Figure(figsize=(11, 1.0 + 0.95 * (max(levels.values()) + 1)), layout="constrained")
    axes: Any = figure.subplots()
    places = {}
    for level in range(max(levels.values()) + 1):
        names = [name for name in levels if levels[name] == level]
        widths = [max(lines[name] / 450, 1.7) for name in names]
        x = -(sum(widths) + 0.5 * (len(names) - 1)) / 2
        for name, width in zip(names, widths):
            places[name] = (x + width / 2, level)
            box = FancyBboxPatch((x, level - 0.22), width, 0.44, boxstyle="round,pad=0.02,rounding_size=0.08")
            box.set(facecolor="#dbe7f3", edgecolor="#35566f", linewidth=1, zorder=3)
            axes.add_patch(box)
            label = f"{ENDS.get(name, name)}\n{lines[name]:,}"
            axes.text(x + width / 2, level, label, ha="center", va="center", fontsize=7.5, zorder=4)
            x += width + 0.5
    for (a, b), count in sorted(direct(arrows).items()):
        if a in places and b in places:
            (xa, ya), (xb, yb) = places[a], places[b]
            up = ORDER.index(b) > ORDER.index(a)
            style = {"color": "#c0392b" if up else "#7f8c8d", "alpha": 0.9 if up else 0.7}
            axes.annotate(
                "", (xb, yb + 0.24), (xa, ya - 0.24), zorder=2 if up else 1,
                arrowprops={"arrowstyle": "->", "lw": min(0.4 + count / 6, 3), "shrinkA": 0, "shrinkB": 0, **style},
            )  # fmt: skip
    longest = max(files, key=lambda name: files[name])
    axes.set_title(
        f"{package.name}: {len(files)} files, {sum(files.values()):,} lines; longest {longest} ({files[longest]}). "
        "Arrows that others imply are left out; red: against the order",
        fontsize=9,
    )
    reach = max(abs(x) for x, _ in places.values()) + 3
    axes.set(xlim=(-reach, reach), ylim=(-0.6, max(levels.values()) + 0.6))
    axes.axis("off")
    with rc_context({"svg.hashsalt": "oryx"}):  # the same code gives the same file
        figure.savefig(output, metadata={"Date": None})


def way() -> dict[str, list[str]]:
    """File of the package → its functions that were given or gave an array, from corpus to export."""
    import tempfile
    import threading

    import numpy as np
    import torch

    from oryx_megatron.testing.project import tiny_project
    from oryx_megatron.tools import convert_to_hf, preprocess_data
    from oryx_megatron.train import __main__ as train

    found: dict[str, set[str]] = {}

    def holds(value: Any, depth: int = 0) -> bool:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return True
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return depth < 2 and any(holds(entry, depth + 1) for entry in list(inner)[:6])

    def follow(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name == "<module>":
            return
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if (event == "call" and any(holds(frame.f_locals.get(name)) for name in given)) or (
            event == "return" and holds(arg)
        ):
            found.setdefault(str(Path(code.co_filename).relative_to(PACKAGE)), set()).add(code.co_name)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = tiny_project(folder)
        (folder / "text.txt").write_text("maan rolit " * 4000, encoding="utf-8")
        threading.setprofile(follow)
        sys.setprofile(follow)
        try:
            text, data = ("--input", str(folder / "text.txt")), ("--output", str(folder / "tokens"))
            preprocess_data.main(
                [*text, *data, "--tokenizer", str(folder / "tokenizer"), "--processes", "1", "--quiet"]
            )
            changes = [f"data.blend=[{folder}/tokens]", "train.iterations=2", f"output_dir={folder}/out"]
            train.main([str(run), *changes, "data.split=[100,0,0]", "evaluation.plans=[attention]"])
            convert_to_hf.main([str(folder / "out"), str(folder / "hf")])
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    return {name: sorted(functions) for name, functions in sorted(found.items())}


def main() -> int:
    """Parse and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="picture to write (.svg, .png)")
    parser.add_argument("--way", action="store_true", help="list the files that tokens pass")
    parser.add_argument("--package", type=Path, default=PACKAGE, help="package folder (default: this checkout's)")
    arguments = parser.parse_args()
    if arguments.way:
        found = way()
        sys.stdout.write("".join(f"{name}: {', '.join(names)}\n" for name, names in found.items()))
        sys.stdout.write(f"{len(found)} files\n")
    if arguments.output is not None:
        draw(arguments.package.resolve(), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
