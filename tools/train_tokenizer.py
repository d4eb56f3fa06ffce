#!/usr/bin/env python
"""Train a tokenizer on a corpus and measure it, or adopt an existing one.

Examples:
    oryx tokenizer --vocab-size 8192 --output tokenizers/mine
    oryx tokenizer --input pages.jsonl --kind byte-level \\
        --vocab-size 32768 --output tokenizers/pages
    oryx tokenizer --adopt FOLDER --eod "<|endoftext|>"

Every tenth document (--held-out) is kept from training, for the report.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from oryx_megatron.cli import Parser, main_guard, positive, share, whole
from oryx_megatron.data.corpus import SKIPPED, STDLIB, ReadOptions
from oryx_megatron.data.tokenizer import MODEL_FILES, write_manifest
from oryx_megatron.display import left_out_lines, shown, shown_lines
from oryx_megatron.errors import DataError
from oryx_megatron.paths import expand_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oryx_megatron.data.sampling import TrainingText
    from oryx_megatron.data.tokenizer import Tokenizer


COVERAGE = 0.9999
"""Share of the characters of a text that become pieces of a SentencePiece model, unless --character-coverage says."""


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    expand_arguments(args, "--input", urls=True)
    expand_arguments(args, "--output", "--adopt")
    from oryx_megatron.data.sampling import TrainingText
    from oryx_megatron.data.train_tokenizer import (
        OUTPUTS,
        check_folder,
        measure,
        train_byte_level,
        train_sentencepiece,
    )

    _check_options(args)
    if args.adopt:
        kind = next((kind for kind, name in MODEL_FILES.items() if name == args.file), None)
        tokenizer = write_manifest(args.adopt, source=f"adopted from {args.adopt}", eod=args.eod, kind=kind)
        print(shown(describe(args.adopt, tokenizer)))
        return 0
    if not args.output:
        raise DataError("--output names the folder of the new tokenizer; it is missing")
    if args.vocab_size < 1:
        raise DataError(f"--vocab-size {args.vocab_size}: give a number above 0")
    check_folder(args.output, args.overwrite)
    source = " ".join(args.input)
    text = TrainingText(
        args.input,
        ReadOptions(text_key=args.text_key, format=args.format, endings=tuple(args.endings)),
        on_error=args.on_error,
        max_bad=args.max_bad,
        sample_bytes=args.sample_bytes,
        every=args.held_out,
        outputs=[Path(args.output, name) for name in OUTPUTS],
    )
    training = progress(text, "training", held_out=False)
    if args.kind == "byte-level":
        tokenizer = train_byte_level(
            training,
            args.output,
            args.vocab_size,
            source=source,
            split_digits=not args.join_digits,
            overwrite=args.overwrite,
            text=text,
        )
    else:
        tokenizer = train_sentencepiece(
            training,
            args.output,
            args.vocab_size,
            source=source,
            model_type=args.kind,
            byte_fallback=not args.no_byte_fallback,
            split_digits=not args.join_digits,
            character_coverage=args.character_coverage,
            overwrite=args.overwrite,
            text=text,
        )
    print(shown(describe(args.output, tokenizer)))
    print(shown_lines(account(args.output, text)))
    measured = progress(text, "measuring", held_out=True) if args.held_out != 0 else iter(())
    if first := next(measured, None):
        print(shown_lines(report(measure(tokenizer, itertools.chain([first], measured)))))
    elif args.held_out != 0:
        print(f"  held out           none: of every {args.held_out} documents the last is, and there are fewer")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raise DataError where an option is wrong, or has no effect beside the others."""
    sentencepiece = {
        "--no-byte-fallback": args.no_byte_fallback,
        "--character-coverage": args.character_coverage != COVERAGE,
    }
    adopt = {"--file": args.file is not None, "--eod": args.eod is not None}
    given = {"--output": args.output is not None}
    for beside, options in (
        ("with --kind byte-level", sentencepiece if args.kind == "byte-level" and not args.adopt else {}),
        ("without --adopt", {} if args.adopt else adopt),
        ("with --adopt, which writes into its FOLDER", given if args.adopt else {}),
    ):
        if wrong := [name for name, is_given in options.items() if is_given]:
            raise DataError(f"{wrong[0]}: has no effect {beside}; remove it")
    if not 0.98 <= args.character_coverage <= 1:  # what SentencePiece takes
        raise DataError(f"--character-coverage: {args.character_coverage:g} should be from 0.98 to 1")
    if args.held_out == 1:
        raise DataError("--held-out: 1 keeps every document from training; use 2 or more, or 0 for none")


def progress(text: TrainingText, what: str, *, held_out: bool) -> Iterator[str]:
    """Texts to train on, or those held out, with a bar."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=what, leave=False, dynamic_ncols=True, disable=None) as bar:
        for document in text.texts(held_out=held_out):
            bar.update(len(document.data))
            yield document.text


def account(folder: str, text: TrainingText) -> str:
    """What was trained on, and what was not."""
    facts = text.facts()
    sample = f", a sample of {text.size / 1e6:,.2f} MB of input" if text.sample_bytes is not None else ""
    lines = [f"  trained on         {facts['bytes'] / 1e6:,.2f} MB{sample}"]
    lines += left_out_lines(facts, 19, f"{folder}/{SKIPPED}")
    return "\n".join(lines)


def describe(folder: str, tokenizer: Tokenizer) -> str:
    end = tokenizer.piece(tokenizer.eod_id)
    return f"{folder}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens; documents end with {end} ({tokenizer.eod_id})"


def report(found: dict) -> str:
    lines = [
        f"  held out           {found['documents']:,} documents, {found['bytes'] / 1e6:,.2f} MB",
        f"  bytes per token    {found['bytes_per_token']:.3f}",
        f"  vocabulary used    {found['used']:.1%}",
        f"  left to bytes      {found['single_bytes']:.3%} of the tokens",
        f"  unknown tokens     {found['unknown']:,}",
        f"  decoded exactly    {found['documents'] - found['inexact']:,} of {found['documents']:,} documents",
    ]
    if found["divided"]:
        lines.append(f"  in several tokens  {', '.join(found['divided'])}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", nargs="+", default=[STDLIB], help=f"`{STDLIB}`, files, folders, URLs")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument(
        "--format", choices=["auto", "text", "jsonl", "parquet"], default="auto", help="default: by ending"
    )
    parser.add_argument("--endings", nargs="+", default=[], help="endings of the files that folders contribute")
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="bad input; default: stop")
    parser.add_argument(
        "--max-bad", type=share, default=0.01, metavar="SHARE", help="with skip, of documents and input (default: 0.01)"
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in that folder")
    parser.add_argument("--vocab-size", type=int, default=8192, help="default: 8192")
    parser.add_argument(
        "--kind", choices=["bpe", "unigram", "byte-level"], default="bpe", help="SentencePiece's, or Hugging Face's BPE"
    )
    parser.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")
    parser.add_argument("--join-digits", action="store_true", help="let numbers be tokens; default: single digits")
    parser.add_argument(
        "--character-coverage", type=float, default=COVERAGE, metavar="SHARE", help=f"default: {COVERAGE}"
    )
    parser.add_argument(
        "--sample-bytes", type=positive, metavar="N", help="train on this much text at most, spread over all inputs"
    )
    parser.add_argument("--held-out", type=whole, default=10, metavar="N", help="measure on every N-th; 0: on none")
    parser.add_argument("--adopt", metavar="FOLDER", help="write manifest.json for the tokenizer files of a folder")
    parser.add_argument(
        "--file",
        choices=list(MODEL_FILES.values()),
        metavar="NAME",
        help=f"with --adopt: the one to take where a folder holds several of {', '.join(MODEL_FILES.values())}",
    )
    parser.add_argument("--eod", metavar="PIECE", help="with --adopt: the piece that ends documents")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
