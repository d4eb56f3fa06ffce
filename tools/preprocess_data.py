#!/usr/bin/env python
"""Turn text into a megatron-core indexed dataset: PREFIX.bin, .idx, and .json.

Examples (T is the folder of a tokenizer, as tokenizers/stdlib-8k):
    oryx data preprocess --input stdlib --tokenizer T --output data/x
    oryx data preprocess --input pages/*.jsonl.zst --text-key body \\
        --tokenizer T --output data/pages
    oryx data preprocess --input s3://bucket/corpus --shard 3/16 \\
        --tokenizer T --output data/corpus

Input is `stdlib` (the sources of the running Python's standard library), files,
folders or fsspec URLs: .jsonl, .parquet, or text; .gz, .zst, .bz2, .xz too.
A run that was stopped or killed resumes when started again.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING

from oryx_megatron.cli import Parser, main_guard, positive, share
from oryx_megatron.data.files import shard_prefix
from oryx_megatron.display import left_out_lines, shown_lines
from oryx_megatron.errors import DataError
from oryx_megatron.paths import expand_arguments

if TYPE_CHECKING:
    from tqdm import tqdm

    from oryx_megatron.data.preprocess import Progress


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    expand_arguments(args, "--input", urls=True)
    expand_arguments(args, "--tokenizer", "--output")
    from oryx_megatron.data.corpus import ReadOptions
    from oryx_megatron.data.indexed import output_prefix
    from oryx_megatron.data.preprocess import Job, preprocess

    job = Job(
        inputs=tuple(args.input),
        tokenizer=args.tokenizer,
        read=ReadOptions(
            format=args.format,
            text_key=args.text_key,
            separator=args.separator,
            endings=tuple(args.endings),
            max_document_bytes=args.max_document_bytes,
            keep_empty=args.keep_empty,
            keep_nul=args.keep_nul,
        ),
        append_eod=not args.no_eod,
        on_error=args.on_error,
        max_bad=args.max_bad,
        fast=args.fast == "auto",
        verify_fraction=args.verify_fraction,
        shard=args.shard,
    )
    prefix = shard_prefix(output_prefix(args.output), args.shard)
    start = time.perf_counter()
    with Bar(args.quiet) as bar:
        manifest = preprocess(
            job,
            prefix,
            processes=args.processes,
            overwrite=args.overwrite,
            restart=args.restart,
            report=bar.show,
        )
    seconds = time.perf_counter() - start
    if args.json:
        summary = {"prefix": str(prefix), "seconds": round(seconds, 3), **manifest}
        print(json.dumps(summary | {"bytes_per_token": manifest["bytes"] / manifest["tokens"]}, ensure_ascii=False))
    else:
        print(shown_lines(summarize(str(prefix), manifest, seconds)))
    return 0


class Bar:
    """Progress: bytes of input, what is left of the time, documents, tokens per second.

    A bar on a terminal; a line each minute where the output goes to a file.
    """

    def __init__(self, quiet: bool) -> None:
        self.bar: tqdm | None = None
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.start = self.told = time.perf_counter()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, progress: Progress) -> None:
        now = time.perf_counter()
        if self.quiet or (not self.terminal and now - self.told < 60):
            return
        from tqdm import tqdm

        seconds = now - self.start
        counts = f"{tqdm.format_sizeof(progress.documents)} docs, {tqdm.format_sizeof(progress.tokens / seconds)} tok/s"
        if not self.terminal:
            line = tqdm.format_meter(
                progress.bytes,
                progress.total,
                seconds,
                ncols=0,
                unit="B",
                unit_scale=True,
                initial=progress.before,
                postfix=counts,
            )
            print(line.strip(), file=sys.stderr, flush=True)
            self.told = now
            return
        if self.bar is None:
            # Terminals that do not tell their size (some containers') get 80 columns; tqdm alone would draw nothing.
            known = 0 not in os.get_terminal_size(sys.stderr.fileno())
            size = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
            self.bar = tqdm(
                total=progress.total, initial=progress.before, unit="B", unit_scale=True, leave=False, **size
            )
        self.bar.set_postfix_str(counts, refresh=False)
        self.bar.update(progress.bytes - self.bar.n)


def summarize(prefix: str, manifest: dict, seconds: float) -> str:
    """The result for people, within 80 columns."""
    size, tokens = manifest["bytes"], manifest["tokens"]
    lines = [
        f"{prefix}.bin, .idx, .json",
        f"  documents        {manifest['documents']:,} (longest {manifest['longest']:,} tokens)",
        f"  tokens           {tokens:,} ({manifest['dtype']})",
        f"  text             {size / 1e6:,.1f} MB, {size / tokens:.2f} bytes per token",
        f"  time             {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s",
    ]
    paths = dict(manifest["paths"])
    why = [f"{text.removeprefix('because: ')}: {n:,}" for text, n in paths.items() if text.startswith("because: ")]
    verified = paths.get("verified", 0)
    ways = [
        f"{n:,} by {name}" for name, n in paths.items() if n and name != "verified" and not name.startswith("because")
    ]
    lines.append(f"  encoded          {', '.join(ways)}" + (f"; {verified:,} of them compared" if verified else ""))
    lines += [f"                     ({line})" for line in why]
    lines += left_out_lines(manifest, 17, f"{prefix}.skipped.jsonl")
    return "\n".join(lines)


def shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if int(count) < 1:
        raise ValueError
    return int(number), int(count)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", required=True, nargs="+", help="`stdlib`, files, folders, URLs; in this order")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="name of the dataset without ending")
    parser.add_argument("--processes", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--restart", action="store_true", help="forget an unfinished run instead of resuming it")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="do the I-th of N parts only")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    group = parser.add_argument_group("documents")
    group.add_argument(
        "--format", choices=["auto", "text", "jsonl", "parquet"], default="auto", help="default: by ending"
    )
    group.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    group.add_argument("--separator", help="text between documents of a text file; default: a file is one document")
    group.add_argument("--endings", nargs="+", default=[], help="endings of the files that folders contribute")
    group.add_argument("--no-eod", action="store_true", help="do not end documents with the end-of-document token")
    group.add_argument("--keep-empty", action="store_true", help="keep empty documents, as megatron's tool does")
    group = parser.add_argument_group("bad input")
    group.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="default: stop at the first")
    group.add_argument(
        "--max-bad", type=share, default=0.01, metavar="SHARE", help="with skip, of documents and input (default: 0.01)"
    )
    group.add_argument("--keep-nul", action="store_true", help="keep documents with NUL characters")
    group.add_argument(
        "--max-document-bytes", type=positive, default=1 << 28, metavar="N", help="longer ones are bad (default: 2^28)"
    )
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--fast", choices=["auto", "off"], default="auto", help="gigatoken, where its tokens are the same"
    )
    group.add_argument(
        "--verify-fraction",
        type=share,
        default=0.001,
        metavar="SHARE",
        help="of its documents compared (default: 0.001)",
    )
    args = parser.parse_args(argv)
    if args.separator is not None:
        try:
            args.separator = args.separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
        except UnicodeDecodeError as error:
            raise DataError(f"--separator {args.separator!r}: {error}") from error
        if not args.separator:
            raise DataError("--separator is empty")
    return args


if __name__ == "__main__":
    sys.exit(main())
