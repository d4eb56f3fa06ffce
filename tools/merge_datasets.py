#!/usr/bin/env python
"""Join indexed datasets into one: shards of a corpus, or corpora of one tokenizer.

Examples:
    oryx data merge --output data/pages data/pages-*-of-00016.idx
    oryx data merge --output data/all data/books data/code
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import sys

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.display import shown
from oryx_megatron.paths import expand_arguments


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    parser = Parser(description=__doc__)
    parser.add_argument("datasets", nargs="+", help="prefixes, or their .idx files, in the order of the documents")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="name of the merged dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args(argv)
    expand_arguments(args, "datasets", urls=True)
    expand_arguments(args, "--output")
    from oryx_megatron.data.datasets import merge

    prefixes = [name.removesuffix(".idx") for name in args.datasets]
    manifest = merge(prefixes, args.output, overwrite=args.overwrite)
    print(
        f"{shown(args.output)}.bin, .idx, .json: {len(prefixes)} datasets, {manifest['documents']:,} documents, "
        f"{manifest['tokens']:,} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
