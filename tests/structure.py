#!/usr/bin/env python3
"""Draw the package: its parts from ground to roof, lines of code, and who imports whom.

    python tests/structure.py docs/images/structure.svg
    python tests/structure.py before.svg --package ../an-older-checkout/oryx_megatron

Reads the code's own imports, by the rules of tests/unit/test_imports.py. A part stands above all that it imports.
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

ENDS = {"SHARED": "hf (torch alone)", "PURE": "hf (pure Python)", "MAINS": "commands", "TOP": "environment"}


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
    for (a, b), count in direct(arrows).items():
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
    figure.savefig(output)


def main() -> int:
    """Parse and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="picture to write (.svg, .png)")
    parser.add_argument("--package", type=Path, default=PACKAGE, help="package folder (default: this checkout's)")
    arguments = parser.parse_args()
    draw(arguments.package.resolve(), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
