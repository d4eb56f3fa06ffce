#!/usr/bin/env python
"""Train a tokenizer on a corpus and measure it, or adopt an existing one.

Examples:
    python tools/train_tokenizer.py --vocab-size 8192 --output tokenizers/mine
    python tools/train_tokenizer.py --input pages.jsonl --kind byte-level \\
        --vocab-size 32768 --output tokenizers/pages
    python tools/train_tokenizer.py --adopt FOLDER --eod "<|endoftext|>"

Every tenth document (--held-out) is kept from training, for the report.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.data.corpus import STDLIB
from oryx_megatron.data.tokenizer import MODEL_FILES, write_manifest
from oryx_megatron.display import shown, shown_lines
from oryx_megatron.errors import DataError
from oryx_megatron.paths import expand_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oryx_megatron.data.tokenizer import Tokenizer


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    expand_arguments(args, "--input", urls=True)
    expand_arguments(args, "--output", "--adopt")
    from oryx_megatron.data.train_tokenizer import check_folder, measure, train_byte_level, train_sentencepiece

    if args.adopt:
        kind = next((kind for kind, name in MODEL_FILES.items() if name == args.file), None)
        tokenizer = write_manifest(args.adopt, source=f"adopted from {args.adopt}", eod=args.eod, kind=kind)
        print(shown(describe(args.adopt, tokenizer)))
        return 0
    if not args.output:
        raise DataError("--output names the folder of the new tokenizer; it is missing")
    check_folder(args.output, args.overwrite)
    source = " ".join(args.input)
    training = documents(args, "training", held_out=False)
    if args.kind == "byte-level":
        tokenizer = train_byte_level(
            training,
            args.output,
            args.vocab_size,
            source=source,
            split_digits=not args.join_digits,
            overwrite=args.overwrite,
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
        )
    print(shown(describe(args.output, tokenizer)))
    if args.held_out != 0:
        print(shown_lines(report(measure(tokenizer, documents(args, "measuring", held_out=True)))))
    return 0


def documents(args: argparse.Namespace, what: str, *, held_out: bool) -> Iterator[str]:
    """Texts to train on, or those held out; --sample-bytes ends them early."""
    from tqdm import tqdm

    from oryx_megatron.data.corpus import read_documents

    taken = 0
    every = args.held_out
    with tqdm(unit="B", unit_scale=True, desc=what, leave=False, dynamic_ncols=True, disable=None) as bar:
        number = 0
        for source in args.input:
            for document in read_documents(source, text_key=args.text_key):
                # A part of a very long document counts as a document here.
                number += 1
                if (every != 0 and number % every == 0) != held_out:
                    continue
                taken += len(document.data)
                bar.update(len(document.data))
                yield document.text
                if args.sample_bytes is not None and taken >= args.sample_bytes:
                    return


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--input", nargs="+", default=[STDLIB], help=f"`{STDLIB}`, files, folders, URLs")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument("--output", metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in that folder")
    parser.add_argument("--vocab-size", type=int, default=8192, help="default: 8192")
    parser.add_argument(
        "--kind", choices=["bpe", "unigram", "byte-level"], default="bpe", help="SentencePiece's, or Hugging Face's BPE"
    )
    parser.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")
    parser.add_argument("--join-digits", action="store_true", help="let numbers be tokens; default: single digits")
    parser.add_argument("--character-coverage", type=float, default=0.9999, metavar="SHARE", help="default: 0.9999")
    parser.add_argument("--sample-bytes", type=int, metavar="N", help="train on this much text at most")
    parser.add_argument("--held-out", type=int, default=10, metavar="N", help="measure on every N-th; 0: on none")
    parser.add_argument("--adopt", metavar="FOLDER", help="write manifest.json for the tokenizer files of a folder")
    parser.add_argument(
        "--file", choices=list(MODEL_FILES.values()), help="with --adopt: the one to take where a folder holds several"
    )
    parser.add_argument("--eod", metavar="PIECE", help="with --adopt: the piece that ends documents")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
