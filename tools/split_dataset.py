#!/usr/bin/env python
"""Divide an indexed dataset by documents, into OUTPUT_NAME for each NAME.

Examples:
    oryx data split data/pages train=98 valid=2
    oryx data split data/pages a=1 b=2 --seed 7 --output data/r
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import sys

from oryx_megatron.cli import Parser, main_guard, seed
from oryx_megatron.display import shown
from oryx_megatron.errors import DataError
from oryx_megatron.paths import expand_arguments, is_url


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    parser = Parser(description=__doc__)
    parser.add_argument("dataset", metavar="PREFIX")
    parser.add_argument("parts", nargs="+", metavar="NAME=SHARE", help="names and relative sizes of the parts")
    parser.add_argument("--seed", type=seed, help="assign documents at random; default: parts follow each other")
    parser.add_argument("--output", metavar="OUTPUT", help="default: PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace existing datasets")
    args = parser.parse_args(argv)
    expand_arguments(args, "dataset", urls=True)
    expand_arguments(args, "--output")
    shares: dict[str, float] = {}
    for part in args.parts:
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError as error:
            raise DataError(f"part {part!r} is not NAME=SHARE, as in train=98") from error
        if not name or name in shares:
            raise DataError(f"part {part!r}: every part needs a name of its own")
        shares[name] = value
    from oryx_megatron.data.datasets import split

    if args.output is None and is_url(args.dataset):
        raise DataError(f"--output: is needed for {args.dataset}: parts are written on this machine")
    output = args.output or args.dataset
    manifests = split(args.dataset, shares, output, seed=args.seed, overwrite=args.overwrite)
    for name, manifest in manifests.items():
        print(f"{shown(f'{output}_{name}')}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
