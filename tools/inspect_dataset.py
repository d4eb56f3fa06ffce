#!/usr/bin/env python
"""Look into an indexed dataset: statistics, texts; check it; compare two.

Examples:
    oryx data inspect data/stdlib
    oryx data inspect data/stdlib --documents 0 17 \\
        --tokenizer tokenizers/stdlib-8k
    oryx data inspect data/stdlib --verify --plot lengths.png
    oryx data inspect data/stdlib --compare data/other
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.data.files import check_output, is_marked, mark, replacing
from oryx_megatron.display import plain_texts, shown, shown_lines
from oryx_megatron.errors import DataError
from oryx_megatron.paths import expand_arguments, is_url

if TYPE_CHECKING:
    import numpy as np

    from oryx_megatron.data.indexed import Dataset

ENDS = ("bin", "idx", "json")


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    parser = Parser(description=__doc__)
    parser.add_argument("dataset", metavar="PREFIX")
    parser.add_argument("--documents", nargs="+", type=int, default=[], metavar="N", help="print these, from 0")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="to print text; its vocabulary is used by --verify")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to print of each (default: 200)")
    parser.add_argument("--verify", action="store_true", help="read everything and check it; exit code 1 if unsound")
    parser.add_argument("--compare", metavar="PREFIX", help="exit code 1 if the other dataset differs")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the document lengths")
    parser.add_argument("--overwrite", action="store_true", help="with --plot: replace an earlier picture")
    args = parser.parse_args(argv)
    expand_arguments(args, "dataset", "--compare", urls=True)
    expand_arguments(args, "--tokenizer", "--plot")
    from oryx_megatron.data.datasets import compare, document_lengths, verify
    from oryx_megatron.data.indexed import file_of, open_dataset
    from oryx_megatron.data.tokenizer import load_tokenizer

    dataset = open_dataset(args.dataset, content=not args.verify)  # which tells all that is wrong
    if args.plot:
        prefixes = [Path(prefix) for prefix in (args.dataset, args.compare or args.dataset) if not is_url(prefix)]
        files = [file_of(prefix, end) for prefix in prefixes for end in ENDS]
        check_output(args.plot, ours=is_marked, overwrite=args.overwrite, inputs=files)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    lengths = document_lengths(dataset)
    for number in args.documents:
        if not 0 <= number < dataset.documents:
            raise DataError(f"there is no document {number}: {args.dataset} has 0 to {dataset.documents - 1}")
        tokens = dataset.document(number)
        print(f"document {number}: {len(tokens):,} tokens")
        first = tokens[: args.tokens].tolist()
        text = tokenizer.decode(first) if tokenizer is not None else " ".join(map(str, first))
        lines = text.splitlines() if tokenizer is not None else textwrap.wrap(text, 76)
        lines = [shown(line.expandtabs()) for line in lines]
        print("\n".join(f"  | {line}" for line in lines) + ("\n  | …" if len(tokens) > args.tokens else ""))
    if not (args.documents or args.compare):
        print(shown_lines(statistics(dataset, lengths)))
    if args.plot:
        plot(lengths, args.dataset, args.plot)
        print(f"picture: {shown(args.plot)}")
    status = 0
    if args.compare:
        differences = compare(args.dataset, args.compare)
        print(shown(f"{args.dataset} and {args.compare}: ") + ("differ" if differences else "the same documents"))
        print("".join(f"  {line}\n" for line in differences), end="")
        status = 1 if differences else 0
    if args.verify:
        findings = verify(
            args.dataset,
            eod=tokenizer.eod_id if tokenizer is not None else None,
            vocab_size=tokenizer.vocab_size if tokenizer is not None else None,
        )
        for problem in findings.problems:
            print(f"  problem: {problem}")
        print(f"verified: highest token {findings.highest:,}; {len(findings.problems) or 'no'} problem(s)")
        if findings.ended is not None:
            print(f"  {findings.ended:,} documents end with the end-of-document token")
        status = 1 if findings.problems else status
    return status


def statistics(dataset: Dataset, lengths: np.ndarray) -> str:
    """Counts, and a histogram of document lengths, within 80 columns."""
    import numpy as np

    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95])
    manifest = dataset.facts
    made = manifest.get("tokenizer")
    lines = [
        f"{dataset.prefix}",
        f"  documents   {dataset.documents:,}",
        f"  tokens      {dataset.tokens:,} ({dataset.index.dtype})",
        f"  lengths     {lengths.min():,} to {lengths.max():,}, mean {lengths.mean():,.1f}",
        f"  quantiles   5 %: {quantiles[0]:,.0f}   50 %: {quantiles[1]:,.0f}   95 %: {quantiles[2]:,.0f}",
    ]
    if made is not None:
        lines.append(f"  tokenizer   {made['name']} ({made['kind']}, {made['vocab_size']:,} tokens)")
    else:
        lines.append("  tokenizer   not known: no manifest")
    if manifest.get("bytes") is not None:
        about = " (estimated)" if manifest.get("bytes_estimated") else ""
        lines.append(
            f"  text        {manifest['bytes']:,} bytes{about}, {manifest['bytes'] / dataset.tokens:.3f} per token"
        )
    lines.append("  tokens per document")
    edges = [0, *(2**power for power in range(int(np.log2(max(lengths.max(), 1))) + 2))]
    counts = np.histogram(lengths, edges)[0]
    first, last = np.flatnonzero(counts)[[0, -1]]
    for count, low, high in zip(counts[first : last + 1], edges[first:], edges[first + 1 :]):
        bar = "█" * round(36 * count / counts.max()) or ("▏" if count else "")
        lines.append(f"  {low:>10,} to {high - 1:>10,} {count:>11,} {bar}")
    return "\n".join(lines)


def plot(lengths: np.ndarray, title: str, path: str) -> None:
    """Histogram of document lengths on a logarithmic axis."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("--plot needs the package matplotlib: pip install matplotlib")
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(lengths, np.geomspace(max(lengths.min(), 1), lengths.max() + 1, 60).tolist(), color="#33638d")
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents", title=shown(title))
    axes.axvline(float(np.median(lengths)), color="black", linestyle="--", label=f"median {np.median(lengths):,.0f}")
    axes.legend(frameon=False)
    plain_texts(figure)
    ending, known = path.rpartition(".")[2], figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise DataError(f"--plot {path}: the name must end in one of {', '.join(sorted(known))}")
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format=ending, metadata=mark(ending) or None)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
