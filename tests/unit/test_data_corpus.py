"""Corpora: every format and compression, cut anywhere, and every kind of bad input with file and line."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from oryx_megatron.data import corpus
from oryx_megatron.data.corpus import Bad, Reading, ReadOptions, Text, describe, plan, read, read_documents
from oryx_megatron.errors import DataError

TEXTS = ["one", "zwei\nzwei", " drei é 漢字 🙂 ", "vier" * 9, "x", "\ttab\r\n", "letzter"]
JSON_LINES = "".join(
    json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)
)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def items(*inputs: Path | str, unit_bytes: int | None = None, options: ReadOptions | None = None) -> list[Text | Bad]:
    options = options or ReadOptions()
    units = plan([str(source) for source in inputs], options, unit_bytes)
    return [item for unit in units for item in read(unit, options)]


def texts(*inputs: Path | str, unit_bytes: int | None = None, **options: object) -> list[str]:
    found = items(*inputs, unit_bytes=unit_bytes, options=ReadOptions(**options))  # type: ignore[arg-type]
    assert all(isinstance(item, Text) for item in found), found
    return [item.text for item in found]  # type: ignore[union-attr]


def bad(*inputs: Path | str, **options: object) -> list[str]:
    found = items(*inputs, options=ReadOptions(**options))  # type: ignore[arg-type]
    return [describe(item) for item in found if isinstance(item, Bad)]


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_and_text_in_every_compression(tmp_path: Path, ending: str) -> None:
    lines, text = tmp_path / f"a.jsonl{ending}", tmp_path / f"b.txt{ending}"
    lines.write_bytes(COMPRESS[ending](JSON_LINES.encode()))
    text.write_bytes(COMPRESS[ending](b"one document\nof two lines\n"))
    assert texts(tmp_path) == [*TEXTS, "one document\nof two lines\n"]
    assert texts(text, lines)[0] == "one document\nof two lines\n"


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": range(7), "body": TEXTS}), tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path, text_key="body") == TEXTS
    assert texts(tmp_path / "a.parquet", text_key="body", unit_bytes=1) == TEXTS  # one row group per piece of work
    assert "no column 'text', only 'id', 'body'; see --text-key" in bad(tmp_path)[0]
    assert "column 'id' holds int64, not text" in bad(tmp_path, text_key="id")[0]
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert bad(tmp_path) == [f"{tmp_path}/a.parquet:row 2: missing key (the row is null)"]


@pytest.mark.parametrize("unit", [1, 7, 64, 10_000])
@pytest.mark.parametrize("block", [3, 50, 1 << 22])
def test_documents_do_not_depend_on_where_work_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int, block: int
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", block)
    (tmp_path / "a.jsonl").write_text(JSON_LINES + "\n\n" + JSON_LINES.rstrip("\n"))
    assert texts(tmp_path, unit_bytes=unit) == TEXTS * 2
    (tmp_path / "a.jsonl").unlink()
    for separator in ("<|end|>", "\n", "\n\n", "aa"):
        (tmp_path / "a.txt").write_text(separator.join(["", "one", "two", "", "a b", "three é", ""]))
        assert texts(tmp_path, unit_bytes=unit, separator=separator) == ["one", "two", "a b", "three é"]


def test_line_numbers_survive_the_cutting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 16)
    lines = [json.dumps({"text": f"document {i}"}) for i in range(40)]
    lines[7] = lines[23] = lines[39] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for unit in (1, 30, 64, 1000):
        places = [item.place for item in items(tmp_path, unit_bytes=unit) if isinstance(item, Bad)]
        assert places == [f"{tmp_path}/a.jsonl:{line}" for line in (8, 24, 40)]


def test_small_files_share_a_piece_of_work_and_keep_their_order(tmp_path: Path) -> None:
    for name in ("b/two.py", "a.py", "b/ten.txt", "a/one.md", "b.unknown", ".hidden.py", "__pycache__/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.py", "a/one.md", "b/ten.txt", "b/two.py"]
    assert texts(tmp_path, endings=(".unknown",)) == ["b.unknown"]
    assert [len(unit) for unit in plan([str(tmp_path)], ReadOptions())] == [4]
    assert [len(unit) for unit in plan([str(tmp_path)], ReadOptions(), unit_bytes=10)] == [2, 2]


def test_remote_files(tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/corpus/b.jsonl", JSON_LINES.encode())
    system.pipe("/corpus/a.txt.gz", gzip.compress(b"text"))
    assert texts("memory://corpus") == ["text", *TEXTS]
    assert texts("memory://corpus/b.jsonl", unit_bytes=64) == TEXTS
    (tmp_path / "c.txt").write_text("local")
    assert texts(f"file://{tmp_path}") == ["local"]
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("deep/a.jsonl.gz", gzip.compress(JSON_LINES.encode()))
        archive.writestr("deep/b.txt", "packed")
    assert texts(f"zip://deep::file://{tmp_path}/d.zip") == [*TEXTS, "packed"]
    assert texts(f"zip://deep/a.jsonl.gz::file://{tmp_path}/d.zip") == TEXTS
    assert texts(f"simplecache::file://{tmp_path}/c.txt") == ["local"]
    with pytest.raises(DataError, match="cannot read memory://none: no such file"):
        plan(["memory://none"], ReadOptions())
    with pytest.raises(DataError, match="cannot read nosuch://x"):
        plan(["nosuch://x"], ReadOptions())


BAD_LINES = [
    ('{"text": "a', r"invalid JSON \(Unterminated string starting at column 10\)"),
    ('{"text": "a"', r"invalid JSON \(Expecting ',' delimiter at column 13\)"),
    ('{"body": "a", "n": 1}', r"missing key \(no 'text', only 'body', 'n'; see --text-key\)"),
    ("{}", r"missing key \(no 'text', only nothing"),
    ('["text"]', r"wrong type \(the line is a JSON array, not an object\)"),
    ("3", r"wrong type \(the line is a JSON number"),
    ('{"text": null}', r"wrong type \('text' is a JSON null, not a string\)"),
    ('{"text": 7}', r"wrong type \('text' is a JSON number"),
    ('{"text": ["a"]}', r"wrong type \('text' is a JSON array"),
    ('{"text": ""}', "empty$"),
    ('{"text": "a\\u0000b"}', r"NUL character \(byte 1\)"),
    ('{"text": "\\ud800"}', r"not Unicode \(half a surrogate pair at character 0\)"),
    (b'{"text": "\xff"}', r"not UTF-8 \(byte 0xff at 10 of the line\)"),
    ('{"text": "' + "long " * 100 + '"}', r"too long \(over 200 bytes; see --max-document-bytes\)"),
    ("[" * 100_000, r"invalid JSON \(nested too deep\)"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path, line: str | bytes, message: str) -> None:
    good = b'{"text": "good"}\n'
    raw = line.encode() if isinstance(line, str) else line
    (tmp_path / "a.jsonl").write_bytes(good + raw + b"\n" + good)
    limit = 200 if len(raw) < 1000 else 1 << 20
    first, problem, last = items(tmp_path, options=ReadOptions(max_document_bytes=limit))
    assert isinstance(first, Text)
    assert isinstance(problem, Bad)
    assert isinstance(last, Text)
    assert re.match(rf"{re.escape(str(tmp_path))}/a\.jsonl:2: {message}", describe(problem))


def test_huge_numbers_beside_the_text_do_no_harm(tmp_path: Path) -> None:
    """Python refuses to read integers of more than 4,300 digits."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + "9" * 5000 + '}\n{"text": ' + "9" * 5000 + "}\n")
    good, problem = items(tmp_path)
    assert isinstance(good, Text)
    assert good.text == "a"
    assert isinstance(problem, Bad)
    assert describe(problem).endswith("a.jsonl:2: wrong type ('text' is a JSON number, not a string)")


def test_overlong_lines_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 64)
    line = json.dumps({"text": "x" * 5000})
    short = json.dumps({"text": "short"})
    (tmp_path / "a.jsonl").write_text(f"{short}\n{line}\n{short}\n{line}")
    for unit in (50, 1000, 20_000):
        found = items(tmp_path, unit_bytes=unit, options=ReadOptions(max_document_bytes=300))
        assert [item.place.rpartition(":")[2] for item in found if isinstance(item, Bad)] == ["2", "4"]
        assert [item.text for item in found if isinstance(item, Text)] == ["short", "short"]


def test_bad_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    (tmp_path / "b.txt").write_bytes(b"a\0b")
    (tmp_path / "c.txt").write_bytes(b"")
    assert bad(tmp_path) == [
        f"{tmp_path}/a.txt: not UTF-8 (byte 0xff at 2)",
        f"{tmp_path}/b.txt: NUL character (byte 1)",
        f"{tmp_path}/c.txt: empty",
    ]
    (tmp_path / "a.txt").unlink()
    assert texts(tmp_path, keep_empty=True, keep_nul=True) == ["a\0b", ""]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_truncated_archives(tmp_path: Path, ending: str) -> None:
    data = COMPRESS[ending](b'{"text": "%d"}\n' % 7 + os.urandom(5000).hex().encode())
    (tmp_path / f"a.jsonl{ending}").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.jsonl").write_text('{"text": "next"}\n')
    found = items(tmp_path)
    assert isinstance(found[-1], Text)
    problem = found[-2]
    assert isinstance(problem, Bad)
    assert problem.place == f"{tmp_path}/a.jsonl{ending}"
    assert problem.reason == "unreadable file"
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"not compressed at all")
    assert bad(tmp_path)[0].startswith(f"{tmp_path}/a.jsonl{ending}: unreadable file")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_with_a_dictionary(tmp_path: Path, kind: pa.DataType) -> None:
    """As pandas writes categories, and other tools columns with few values."""
    column = pa.array([*TEXTS, *TEXTS[:2]], pa.string()).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(kind))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=3)
    assert texts(tmp_path / "a.parquet", unit_bytes=1) == [*TEXTS, *TEXTS[:2]]
    pq.write_table(pa.table({"text": pa.array(["a", None]).dictionary_encode()}), tmp_path / "a.parquet")
    assert bad(tmp_path) == [f"{tmp_path}/a.parquet:row 2: missing key (the row is null)"]
    pq.write_table(pa.table({"text": pa.array([1, 2]).dictionary_encode()}), tmp_path / "a.parquet")
    (told,) = bad(tmp_path)
    assert "wrong type (column 'text' holds int64, not text)" in told


def test_truncated_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS * 50}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-10])
    assert bad(tmp_path)[0].startswith(f"{tmp_path}/a.parquet: unreadable file")
    with pytest.raises(DataError, match=r"a\.parquet is no parquet file, or truncated"):
        plan([str(tmp_path)], ReadOptions(), unit_bytes=10)


def test_long_documents_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 100)
    monkeypatch.setattr(corpus, "BLOCK", 33)
    draw = random.Random(1)
    long = "".join(draw.choice(["word ", "é ", "a b", "\n", "  ", "🙂"]) for _ in range(600))
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": long}) + "\n")
    found = items(tmp_path)
    parts = [item for item in found if isinstance(item, Text)]
    assert len(parts) == len(found) > 20
    documents = ["".join(part.text for part in group) for _, group in itertools.groupby(parts, lambda p: p.place)]
    assert documents == [long, long]
    for previous, part in itertools.pairwise(parts):
        assert part.first == previous.last
        if not part.first:
            assert part.text[0] == " "
            assert previous.text[-1].isalpha()
            assert part.text[1].isalpha()
    assert [item.text for item in items(tmp_path, options=ReadOptions(splittable=False))] == [long, long]  # type: ignore


def test_long_text_without_a_place_to_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 100)
    monkeypatch.setattr(corpus, "BLOCK", 50)
    (tmp_path / "a.txt").write_text("a b" + "x" * 900)
    assert texts(tmp_path) == ["a", " b" + "x" * 900] or texts(tmp_path) == ["a b" + "x" * 900]
    assert "bytes without a space between letters" in bad(tmp_path, max_document_bytes=300)[0]
    assert "over 300 bytes" in bad(tmp_path, max_document_bytes=300, splittable=False)[0]
    (tmp_path / "a.txt").write_bytes(b"a b " * 100 + b"\xe9")
    assert "a.txt: not UTF-8" in bad(tmp_path)[0]
    (tmp_path / "a.txt").write_bytes(b"a b " * 100 + b"\xc3")
    assert "a.txt: not UTF-8 (it ends within a character)" in bad(tmp_path)[0]


def test_progress_counts_input_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 64)
    (tmp_path / "a.jsonl").write_text(JSON_LINES * 20)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSON_LINES.encode() * 20))
    units = plan([str(tmp_path)], ReadOptions())
    reading, seen = Reading(), []
    for unit in units:
        for _ in read(unit, ReadOptions(), reading):
            seen.append(reading.done + reading.position())
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert reading.done == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_the_standard_library_is_read_and_its_odd_files_are_known() -> None:
    units = plan(["stdlib"], ReadOptions())
    found = [item for unit in units for item in read(unit, ReadOptions())]
    reasons = {item.reason for item in found if isinstance(item, Bad)}
    assert reasons <= {"empty", "not UTF-8"}
    documents = [item for item in found if isinstance(item, Text)]
    assert len(documents) > 500
    assert sum(len(document.data) for document in documents) > 5_000_000
    assert not any("site-packages" in document.place for document in documents)
    places = [document.place for document in documents]
    assert places == sorted(places, key=str.encode)


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is neither a file, a folder, a URL nor `stdlib`"):
        plan([str(tmp_path / "none")], ReadOptions())
    with pytest.raises(DataError, match="has no file with a known ending; name them with --endings"):
        plan([str(tmp_path)], ReadOptions())
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 \(byte 0xff at 0\)"):
        list(read_documents(str(tmp_path)))
