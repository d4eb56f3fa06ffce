#!/usr/bin/env python
"""Train a tokenizer on a corpus, or adopt the files of an existing one.

Examples:
    python tools/train_tokenizer.py --input stdlib --vocab-size 8192 --output tokenizers/stdlib-8k
    python tools/train_tokenizer.py --adopt FOLDER --eod "<|endoftext|>"
"""

from __future__ import annotations

import argparse
import sys

from oryx_megatron.cli import main_guard
from oryx_megatron.data.corpus import STDLIB, read_documents
from oryx_megatron.data.tokenizer import write_manifest
from oryx_megatron.data.train_tokenizer import train_sentencepiece


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default=STDLIB, help=f"`{STDLIB}`, a .txt or .jsonl file, or a folder")
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl lines")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--output", help="folder to write")
    parser.add_argument("--adopt", metavar="FOLDER", help="write manifest.json for the tokenizer files of a folder")
    parser.add_argument("--eod", help="piece that ends documents (only with --adopt)")
    args = parser.parse_args(argv)
    if args.adopt:
        tokenizer = write_manifest(args.adopt, source=f"adopted from {args.adopt}", eod=args.eod)
        print(f"{args.adopt}: {tokenizer.kind}, {tokenizer.vocab_size} tokens, documents end with {tokenizer.eod_id}")
        return 0
    if not args.output:
        parser.error("--output is required")
    documents = read_documents(args.input, text_key=args.text_key)
    tokenizer = train_sentencepiece((d.text for d in documents), args.output, args.vocab_size, source=args.input)
    print(f"{args.output}: {tokenizer.kind}, {tokenizer.vocab_size} tokens, documents end with {tokenizer.eod_id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
