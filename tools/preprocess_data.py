#!/usr/bin/env python
"""Turn text into a megatron-core indexed dataset.

Examples:
    python tools/preprocess_data.py --input stdlib --tokenizer tokenizers/stdlib-8k --output data/stdlib
    python tools/preprocess_data.py --input pages.jsonl --text-key content --tokenizer … --output data/pages
"""

from __future__ import annotations

import argparse
import sys

from oryx_megatron.cli import main_guard
from oryx_megatron.data.corpus import STDLIB, read_documents
from oryx_megatron.data.preprocess import tokenize_corpus
from oryx_megatron.data.tokenizer import load_tokenizer


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help=f"`{STDLIB}`, a .txt or .jsonl file, or a folder of files")
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl lines (default: text)")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--output", required=True, help="prefix of the dataset: PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument("--no-eod", action="store_true", help="do not end documents with the end-of-document token")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args(argv)
    manifest = tokenize_corpus(
        read_documents(args.input, text_key=args.text_key),
        load_tokenizer(args.tokenizer),
        args.output,
        append_eod=not args.no_eod,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
        source=args.input,
    )
    print(
        f"{args.output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({manifest['dtype']}), "
        f"{manifest['bytes'] / manifest['tokens']:.2f} bytes per token"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
