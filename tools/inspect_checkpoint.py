#!/usr/bin/env python
"""Show what a checkpoint holds, without building its model: tree of tensors,
shapes, sizes, config, evaluations.

Examples:
    oryx inspect runs/quickstart
    oryx inspect runs/quickstart --part all --depth 3
    oryx inspect runs/quickstart --config
    oryx inspect runs/quickstart --verify
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import json
import sys
import warnings
from typing import TYPE_CHECKING

import yaml

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.display import shown, shown_lines
from oryx_megatron.errors import CheckpointError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.storage import named

if TYPE_CHECKING:
    from oryx_megatron.checkpoint.inspect import Summary


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse and print; see --help."""
    parser = Parser(description=__doc__)
    parser.add_argument("path", help="a checkpoint, or a run folder (its newest checkpoint is taken); also s3://…")
    parser.add_argument("--part", choices=("model", "ema", "optimizer", "all"), default="model", help="tensors to list")
    parser.add_argument("--depth", type=int, help="levels of the tree to show; deeper tensors are summed")
    parser.add_argument("--config", action="store_true", help="print the resolved run config (YAML) instead")
    parser.add_argument("--verify", action="store_true", help="compare all files with the manifest's checksums instead")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    arguments = parser.parse_args(argv)
    expand_arguments(arguments, "path", urls=True)
    if arguments.depth is not None and arguments.depth < 1:
        raise CheckpointError(f"--depth: {arguments.depth} should be at least 1")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from oryx_megatron.checkpoint import find_checkpoint
    from oryx_megatron.checkpoint.inspect import METADATA, summarize

    partial = is_url(arguments.path) and not arguments.verify
    summary = summarize(find_checkpoint(arguments.path, only=(METADATA,) if partial else None), partial=partial)
    if arguments.verify:
        return _verify(summary)
    if arguments.json:
        text = json.dumps(summary.to_dict(), indent=1)
    elif arguments.config:
        text = yaml.safe_dump(summary.manifest.config, sort_keys=False, allow_unicode=True, width=120).rstrip()
    else:
        text = shown_lines(_report(summary, arguments.part, arguments.depth))
    sys.stdout.write(text + "\n")
    return 0


def _verify(summary: Summary) -> int:
    from oryx_megatron.checkpoint.store import check_files

    check_files(summary.folder, summary.manifest)
    sys.stdout.write(
        f"{shown(named(summary.folder))}: all {len(summary.manifest.files)} files are as they were written\n"
    )
    return 0


def _report(summary: Summary, part: str, depth: int | None) -> str:
    from oryx_megatron.checkpoint.inspect import tree

    manifest = summary.manifest
    model, layout = manifest.run().model, manifest.layout
    modes = ", ".join(model.pattern) or model.modes
    lines = [
        named(summary.folder),
        f"  iteration {manifest.iteration:,}, {manifest.consumed_samples:,} samples read",
        f"  model {model.name}: {model.mixer}, modes {modes}, {model.num_layers} layers × {model.hidden_size}",
        f"  written under {' × '.join(f'{name} {size}' for name, size in layout.items())}; loads under any layout",
        f"  {_size(summary.file_bytes)} in {len(manifest.files) + 1} files",
        f"  commit {manifest.commit or 'unknown'}",
    ]
    for result in manifest.evaluations:
        averaged = "" if result.get("ema_loss") is None else f", of the average {result['ema_loss']:.4f}"
        lines.append(f"  {result['dataset']} under {result['plan']}: loss {result['loss']:.4f}{averaged}")
    lines += ["", f"{'part':<22}{'tensors':>8}{'elements':>18}{'size':>12}"]
    for name, (tensors, elements, size) in summary.parts().items():
        lines.append(f"{name:<22}{tensors:>8,}{elements:>18,}{_size(size):>12}")
    shown = tuple(e for e in summary.entries if part == "all" or e.part.split(".")[0] == part)
    lines += ["", f"{'tensor':<46}{'shape':<15}{'type':<9}{'size':>10}"]
    for level, name, group in tree(shown, depth=depth):
        shape, dtype = ("", "")
        if len(group) == 1:
            shape, dtype = " × ".join(map(str, group[0].shape)) or "scalar", group[0].dtype
        lines.append(f"{'  ' * level + name:<46}{shape:<15}{dtype:<9}{_size(sum(e.bytes for e in group)):>10}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


if __name__ == "__main__":
    sys.exit(main())
