#!/usr/bin/env python
"""Tokenize the same text with our tool and with Megatron-LM's, from the file to the finished .bin/.idx, and compare.

Examples:
    python benchmarks/preprocess.py --megatron ~/Megatron-LM --megatron-python ~/venv/bin/python
    python benchmarks/preprocess.py --megabytes 40 --kinds sentencepiece

The text is made from the standard library's sources: the first copy as they are; in every further copy a quarter of
the longer words are replaced by words of that copy alone, so that no document and not all words repeat. Per tool and
tokenizer it prints seconds, MB/s, tokens/s, processor seconds (which other work on the machine disturbs less) and the
largest memory of all its processes together. Both write byte-equal datasets, or the benchmark ends with code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import psutil

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.data.corpus import read_documents
from oryx_megatron.data.files import replacing
from oryx_megatron.data.train_tokenizer import train_byte_level
from oryx_megatron.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
WORD = re.compile(r"[A-Za-z_]{5,}")
MEGATRON_KINDS = {"sentencepiece": "SentencePieceTokenizer", "byte-level": "HuggingFaceTokenizer"}


@main_guard
def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--megatron", type=Path, metavar="FOLDER", help="checkout of Megatron-LM; without: ours alone")
    parser.add_argument("--megatron-python", default=sys.executable, help="a Python that can run its tools")
    parser.add_argument("--megabytes", type=int, default=300, help="of text (default: 300)")
    parser.add_argument("--processes", type=int, default=2, help="for both (default: 2)")
    kinds = list(MEGATRON_KINDS)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=" and ".join(kinds))
    parser.add_argument("--folder", type=Path, help="where text and datasets go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    args = parser.parse_args(argv)
    if args.megatron is not None and not (args.megatron / "tools" / "preprocess_data.py").is_file():
        raise DataError(f"{args.megatron} is no checkout of Megatron-LM: it has no tools/preprocess_data.py")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        size = write_text(text, args.megabytes * 1_000_000)
        print(f"{size / 1e6:,.0f} MB of text, {args.processes} processes", flush=True)
        results = []
        for kind in args.kinds:
            results += run_kind(kind, text, size, folder, args)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(result.get("equal", True) for result in results) else 1


def write_text(path: Path, wanted: int) -> int:
    """Write JSON lines with at least so many bytes of text; gives how many."""
    documents = [document.text for document in read_documents("stdlib")]
    size = copy = 0
    with open(path, "w") as file:
        while size < wanted:
            for text in documents:
                changed = WORD.sub(lambda match, copy=copy: of_copy(match[0], copy), text) if copy else text
                file.write(json.dumps({"text": changed}) + "\n")
                size += len(changed.encode())
                if size >= wanted:
                    break
            copy += 1
    return size


def of_copy(word: str, copy: int) -> str:
    """The word itself, or, for a quarter of them, one that no other copy has."""
    seed = zlib.crc32(f"{word} {copy}".encode())
    if seed % 4:
        return word
    letters = []
    for _ in word[2:]:
        seed = (seed * 1_103_515_245 + 12_345) % (1 << 31)
        letters.append("aeioulnrstdm"[(seed >> 16) % 12])
    return word[:2] + "".join(letters)


def run_kind(kind: str, text: Path, size: int, folder: Path, args: argparse.Namespace) -> list[dict]:
    tokenizer = ROOT / "tokenizers" / "stdlib-8k"
    if kind == "byte-level":
        tokenizer = folder / "byte-level"
        texts = (document.text for document in read_documents("stdlib"))
        train_byte_level(texts, tokenizer, 8192, source="stdlib")
    ours = folder / f"ours-{kind}"
    commands = {
        "ours": [
            *(
                sys.executable,
                str(ROOT / "tools" / "preprocess_data.py"),
                "--processes",
                str(args.processes),
                "--quiet",
            ),
            *("--input", str(text), "--tokenizer", str(tokenizer), "--output", str(ours)),
        ]
    }
    if args.megatron is not None:
        model = tokenizer if kind == "byte-level" else tokenizer / "tokenizer.model"
        commands["megatron"] = [
            *(args.megatron_python, "tools/preprocess_data.py", "--workers", str(args.processes), "--append-eod"),
            *("--input", str(text), "--output-prefix", str(folder / f"theirs-{kind}"), "--log-interval", "100000"),
            *("--tokenizer-type", MEGATRON_KINDS[kind], "--tokenizer-model", str(model)),
        ]
    results = []
    for tool, command in commands.items():
        measured = measure(command, cwd=args.megatron if tool == "megatron" else ROOT)
        tokens = json.loads(Path(f"{ours}.json").read_text())["tokens"]
        measured |= {"tool": tool, "kind": kind, "processes": args.processes, "bytes": size, "tokens": tokens}
        results.append(measured)
        seconds, cpu, peak = (measured[name] for name in ("seconds", "cpu_seconds", "peak_mib"))
        print(
            f"  {kind:<14} {tool:<9} {seconds:8.1f} s {size / 1e6 / seconds:7.1f} MB/s "
            f"{tokens / 1e6 / seconds:6.2f} Mtok/s {cpu:8.1f} s cpu {peak:6,.0f} MiB",
            flush=True,
        )
    if len(results) == 2:
        mine, other = results
        theirs = folder / f"theirs-{kind}_text_document"
        equal = all(same(f"{ours}.{end}", f"{theirs}.{end}") for end in ("bin", "idx"))
        mine["equal"] = other["equal"] = equal
        mine["faster"] = other["seconds"] / mine["seconds"]
        mine["less_cpu"] = other["cpu_seconds"] / mine["cpu_seconds"]
        print(
            f"  {kind:<14} {mine['faster']:.1f} times as fast, {mine['less_cpu']:.1f} times less processor time; "
            f"datasets {'equal' if equal else 'DIFFER'}",
            flush=True,
        )
    return results


def measure(command: list[str], cwd: Path) -> dict:
    """Run a command: seconds, processor seconds of it and its children, largest sum of their memory (PSS) in MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        tail = output.decode(errors="replace").strip().splitlines()[-1:]
        raise DataError(f"{' '.join(command[:2])} ended with code {process.returncode}: {' '.join(tail)}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak[0] / 2**20}


def watch(pid: int, peak: list[int]) -> None:
    """Largest memory of a process and all below it; pages they share are counted once."""
    while psutil.pid_exists(pid):
        total = 0
        try:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
        except psutil.NoSuchProcess:
            return
        peak[0] = max(peak[0], total)
        time.sleep(0.2)


def same(left: str, right: str) -> bool:
    with open(left, "rb") as a, open(right, "rb") as b:
        while True:
            x, y = a.read(1 << 22), b.read(1 << 22)
            if x != y:
                return False
            if not x:
                return True


if __name__ == "__main__":
    sys.exit(main())
