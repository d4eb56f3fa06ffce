"""Every byte offered to preprocessing is used, or counted and named."""

from __future__ import annotations

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_corpus import bad, items, texts
from test_data_tools import ROOT, tool
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from oryx_megatron.data import corpus
from oryx_megatron.data.corpus import BOM, LeftOut, Reading, ReadOptions, Text, plan, read
from oryx_megatron.data.datasets import merge
from oryx_megatron.data.files import read_json
from oryx_megatron.data.lost import LostCharacters
from oryx_megatron.data.preprocess import Job, preprocess
from oryx_megatron.data.tokenizer import load_tokenizer, write_manifest
from oryx_megatron.errors import DataError

TOKENIZER = str(ROOT / "tokenizers" / "stdlib-8k")


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def walk(source: Path | str, **options: object) -> tuple[list[str], dict[str, list[str]]]:
    """Texts of a folder in order, and the names of what was left out, by reason."""
    left: list[LeftOut] = []
    units = plan([str(source)], ReadOptions(**options), left_out=left)  # type: ignore[arg-type]
    found = [item for unit in units for item in read(unit, ReadOptions(**options))]  # type: ignore[arg-type]
    reasons: dict[str, list[str]] = {}
    for item in left:
        reasons.setdefault(item.reason, []).append(os.path.relpath(item.place.removeprefix("file://"), source))
    return [item.text for item in found if isinstance(item, Text)], {k: sorted(v) for k, v in reasons.items()}


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    corpus_, other = tmp_path / "corpus", tmp_path / "other"
    for folder, name in ((corpus_ / "a", "1"), (other / "deep", "2"), (tmp_path / "third", "3")):
        folder.mkdir(parents=True)
        (folder / f"{name}.jsonl").write_text(line(name))
    (corpus_ / "b").symlink_to("../other")
    (other / "c").symlink_to(tmp_path / "third")
    (corpus_ / "one.jsonl").symlink_to(tmp_path / "third" / "3.jsonl")
    assert walk(corpus_) == (["1", "3", "2", "3"], {})
    # Loops and second names of a folder end, and are named.
    (corpus_ / "a" / "up").symlink_to(corpus_)
    (other / "back").symlink_to(corpus_ / "a")
    found, left = walk(corpus_)
    assert found == ["1", "3", "2", "3"]
    assert left == {"folder read already under another name": ["a/up", "b/back"]}


def test_many_links_to_each_other_end(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(12)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    for a, b in itertools.permutations(names, 2):
        (tmp_path / a / b).symlink_to(tmp_path / b)
    found, left = walk(tmp_path)
    assert sorted(found) == sorted(names)
    assert len(left["folder read already under another name"]) == 12 * 11


def test_links_to_nothing_and_in_loops_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line("a"))
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "folder").symlink_to("/nowhere/else")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    assert bad(tmp_path) == [
        f"{tmp_path}/folder: unreadable file (a link to /nowhere/else, which does not exist)",
        f"{tmp_path}/gone.jsonl: unreadable file (a link to nowhere, which does not exist)",
        f"{tmp_path}/loop.txt: unreadable file (a link in a loop)",
    ]
    for name, message in (("gone.jsonl", "which does not exist"), ("loop.txt", "a link in a loop")):
        with pytest.raises(DataError, match=message):
            plan([str(tmp_path / name)], ReadOptions())


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "c" / "2.jsonl", tmp_path / "d.jsonl"):
        path.write_text(line("a"))
    (tmp_path / "c").chmod(0)
    (tmp_path / "d.jsonl").chmod(0)
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from test_data_corpus import bad; from pathlib import Path\n"
        "print(*bad(Path(sys.argv[1])), sep='\\n')"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(ROOT / "tests" / "unit")]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    (tmp_path / "c").chmod(0o755)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/c: unreadable file (the folder: Permission denied)",
        f"{tmp_path}/d.jsonl: unreadable file (Permission denied)",
    ], done.stderr


def test_hidden_files_by_one_rule(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".b.jsonl", ".cache/c.jsonl", ".cache/d/e.bin", "x/.git/f.txt", "__pycache__/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line("a"))
    (tmp_path / "x" / ".empty").mkdir()
    left: list[LeftOut] = []
    plan([str(tmp_path)], ReadOptions(), left_out=left)
    assert sum(item.files for item in left) == 5
    assert sum(item.bytes for item in left) == 5 * len(line("a"))
    wanted = ["a"], {"hidden": [".b.jsonl", ".cache", "__pycache__", "x/.git"]}
    assert walk(tmp_path) == wanted
    assert texts(f"file://{tmp_path}") == texts(f"local://{tmp_path}") == ["a"]
    assert texts(tmp_path / ".b.jsonl") == texts(tmp_path / ".cache") == ["a"]  # asked for by name
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("a.jsonl", ".b.jsonl", ".cache/c.jsonl", "d.png"):
        system.pipe(f"/hidden/{name}", line("a").encode())
    left = []
    plan(["memory://hidden"], ReadOptions(), left_out=left)
    assert sorted((item.place, item.reason) for item in left) == [
        ("memory:///hidden/.b.jsonl", "hidden"),
        ("memory:///hidden/.cache/c.jsonl", "hidden"),
        ("memory:///hidden/d.png", "unknown ending"),
    ]


def test_nothing_in_a_folder_blocks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line("a"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "x.skipped.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.txt")[-100:] if len(str(tmp_path)) < 90 else "/tmp/_s")
        (tmp_path / "zero.txt").symlink_to("/dev/zero")
        (tmp_path / "picture.png").write_bytes(b"1234")
        found, left = walk(tmp_path)
    assert found == ["a"]
    assert left["unknown ending"] == ["picture.png"]
    assert {"pipe.jsonl", "x.skipped.jsonl", "zero.txt"} <= set(left["not a regular file"])
    for name, kind in (("pipe.jsonl", "a FIFO"), ("zero.txt", "a device")):
        with pytest.raises(DataError, match=f"is {kind}, neither"):
            plan([str(tmp_path / name)], ReadOptions())


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name in (b"caf\xe9.txt", b"\xff.png", b".\xfe", b"b.txt"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"words")
    assert texts(tmp_path / "in") == ["words", "words"]
    common = ["--quiet", "--processes", "1", "--tokenizer", TOKENIZER]
    for number, source in enumerate((str(tmp_path / "in"), os.fsdecode(folder + b"/caf\xe9.txt"))):
        prefix = tmp_path / f"out{number}"
        assert tool("preprocess_data").main([*common, "--input", source, "--output", str(prefix)]) == 0
        assert read_json(prefix.with_suffix(".json"))["source"] == [source]
    assert "2 × " not in (printed := capsys.readouterr().out)
    assert "\\udcff.png" in printed
    first = read_json(tmp_path / "out0.json")["left_out"]["unknown ending"]["first"]
    assert first == [os.fsdecode(folder + b"/\xff.png")]
    with open(os.path.join(folder, b"caf\xe9.txt"), "wb") as file:
        file.write(b"\xff")
    assert tool("preprocess_data").main([*common, "--input", os.fsdecode(folder), "--output", f"{tmp_path}/o"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["x.jsonl", "x.JSONL", "x.JsonL", "x.jsonlines", "x.JSONLINES", "x.jl", "x.JL", "x.ndjson", "x.ldjson", "x.NDJSON"],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".GZ", ".gzip"])
def test_json_lines_by_every_name(tmp_path: Path, name: str, packed: str) -> None:
    data = (line("one") + line("two")).encode()
    (tmp_path / f"{name}{packed}").write_bytes(gzip.compress(data) if packed else data)
    assert texts(tmp_path) == texts(tmp_path / f"{name}{packed}") == ["one", "two"]


def test_formats_that_the_ending_does_not_tell(tmp_path: Path) -> None:
    (tmp_path / "a.jl").write_text("function f(x)\n  {1}\nend\n")
    (tmp_path / "b.JL").write_text(f"{BOM}\n" + line("b"))
    assert texts(tmp_path) == ["function f(x)\n  {1}\nend\n", "b"]
    for name in ("part-00000", "corpus.dat", "c.gz"):
        data = line("x" * 100_000 if name == "c.gz" else "x").encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name == "c.gz" else data)
        with pytest.raises(DataError, match=f"{name} looks like JSON lines.*--format jsonl"):
            plan([str(tmp_path / name)], ReadOptions())
        assert len(texts(tmp_path / name, format="jsonl")) == 1
        assert texts(tmp_path / name, format="text") == [data.decode()]
    (tmp_path / "d.x").write_text("{ not JSON }\n")
    assert texts(tmp_path / "d.x") == ["{ not JSON }\n"]
    (tmp_path / "e.TXT").write_text("upper")
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "f.PARQUET")
    assert texts(tmp_path)[2:] == ["upper", "p"]
    assert texts(tmp_path, endings=(".txt",)) == ["upper"]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "body"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert bad(tmp_path) == [
        f"{tmp_path}/a.parquet: ambiguous key (2 columns are named 'text'; rename them, or name another one with "
        "--text-key)"
    ]
    assert texts(tmp_path, text_key="body") == ["c"]


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    """JSON keeps the last one; the other would be lost."""
    path = tmp_path / "a.jsonl"
    fine = ['{"text": "a", "meta": {"text": "b", "n": 1}}', '{"type": "text", "text": "say \\"text\\""}']
    doubled = ['{"text": "a", "text": "b"}', '{"text": "a", "n": %s, "text": "b"}' % ("9" * 5000)]
    path.write_text("\n".join([*fine, *doubled]))
    assert [item.text for item in items(path) if isinstance(item, Text)] == ["a", 'say "text"']
    assert bad(path) == [f"{path}:{n}: ambiguous key ('text' is there 2 times)" for n in (3, 4)]
    path.write_text('{"é": "a", "é": "b"}')
    assert bad(path, text_key="é") == [f"{path}:1: ambiguous key ('é' is there 2 times)"]


def test_an_input_that_is_given_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line("a"))
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    for second in ("a.jsonl", "b.jsonl", "../" + tmp_path.name + "/a.jsonl"):
        with pytest.raises(DataError, match=r"input .*\.jsonl is given twice"):
            plan([str(tmp_path / "a.jsonl"), str(tmp_path / second)], ReadOptions())
    for source in ("stdlib", f"file://{tmp_path}"):
        with pytest.raises(DataError, match=f"input {source} is given twice$"):
            plan([source, source], ReadOptions())


@pytest.mark.parametrize(("ending", "compress"), [(".bz2", bz2.compress), (".xz", lzma.compress)])
def test_all_of_a_compressed_file_is_read(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    """Python's readers end at bytes between two streams, and at a second one with a damaged head, without a word."""
    path = tmp_path / f"a.jsonl{ending}"
    one, two = compress(line("one").encode()), compress(line("two").encode() * 3)
    path.write_bytes(one + two)
    assert texts(path) == ["one", "two", "two", "two"]
    for rest in (b"x", b"garbage" * 20, b"\1" + two[1:], two[:-1], two + b"\1" * 99):
        path.write_bytes(one + rest)
        assert bad(path)[0].startswith(f"{path}: unreadable file (")
    if ending == ".xz":  # its format has padding
        for data in (one + bytes(4) + two, bytes(0) + one + bytes(1 << 17) + two + bytes(8)):
            path.write_bytes(data)
            assert texts(path) == ["one", "two", "two", "two"]
    long = " ".join(map(str, range(200_000)))
    (tmp_path / f"b.txt{ending}").write_bytes(compress(long[:600_000].encode()) + compress(long[600_000:].encode()))
    assert texts(tmp_path / f"b.txt{ending}") == [long]
    pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "c.parquet")
    (tmp_path / f"c.parquet{ending}").write_bytes(compress((tmp_path / "c.parquet").read_bytes()))
    assert texts(tmp_path / f"c.parquet{ending}") == ["p", "q"]


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": ["some words of a text"] * 3}),
        path,
        write_page_checksum=True,
        use_dictionary=False,
        compression=None,
    )
    assert texts(path) == ["some words of a text"] * 3
    path.write_bytes(path.read_bytes().replace(b"words", b"wards"))
    assert bad(path)[0].startswith(f"{path}:row group 0: unreadable file (")


@pytest.mark.parametrize("kind", ["bpe", "fallback", "unknown", "bytes", "few bytes"])
def test_characters_without_a_token_are_told(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A BPE without an unknown token leaves out what its vocabulary lacks; the library says nothing."""
    pieces = ["<eos>", "<unk>", *"abc"]
    if kind == "bytes":
        pieces += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(pieces))
    elif kind == "fallback":
        pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [],
            unk_token="<unk>" if kind == "unknown" else None,
            byte_fallback=kind == "fallback",
        )
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = level if "bytes" in kind else pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    write_manifest(folder, source="a test", eod="<eos>")
    (tmp_path / "a.jsonl").write_text(line("abc é cab") + line("zz") + line("abc"))
    manifest = preprocess(
        Job(inputs=(str(tmp_path / "a.jsonl"),), tokenizer=str(folder)), tmp_path / "data", processes=1
    )
    told = "characters that its vocabulary lacks get no token and are lost" in caplog.text
    assert told == (kind in ("bpe", "few bytes"))
    # The spaces are lost where the pre-tokeniser keeps them: `Ġ` is not among the few bytes.
    most = {"bpe": {"z": 2, "é": 1}, "few bytes": {" ": 2, "z": 2, "é": 1}}.get(kind)
    counted = None if most is None else {"characters": sum(most.values()), "documents": 2, "most": most}
    assert manifest.get("lost") == counted
    # One for each letter that it lacks, and an end for each document.
    assert manifest.get("unknown") == (3 if kind == "unknown" else None)
    assert (f"3 of {manifest['tokens']} tokens are the unknown token" in caplog.text) == (kind == "unknown")
    end = (
        f"{counted['characters']} characters of 2 documents got no token and are lost (" if counted else "got no token"
    )
    assert (end in caplog.text) == told
    if told:
        assert "'z' × 2, '\\xe9' × 1)" in caplog.text


@pytest.mark.parametrize("piece_bytes", [None, 40])
def test_lost_characters_add_up(tmp_path: Path, piece_bytes: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """Over pieces of work, shards and merging; a second count, by the tokens that are missing, agrees."""
    draw = random.Random(3)
    texts = ["".join(draw.choice("aabcé漢\U0001f600 ") for _ in range(draw.randrange(60))) for _ in range(40)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["<eos>", *"abc"])}, []))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    write_manifest(folder, source="a test", eod="<eos>")
    (tmp_path / "a.jsonl").write_text("".join(map(line, texts)))
    job = Job(inputs=(str(tmp_path / "a.jsonl"),), tokenizer=str(folder), unit_bytes=piece_bytes, append_eod=False)
    whole = preprocess(job, tmp_path / "whole")
    kept = [text for text in texts if text]
    assert whole["lost"]["characters"] == sum(len("".join(text.split())) for text in texts) - whole["tokens"]
    assert whole["lost"]["documents"] == sum(any(c in text for c in "é漢\U0001f600") for text in kept)
    if piece_bytes is not None:
        parts = [tmp_path / f"part{number}" for number in (1, 2)]
        for number, part in enumerate(parts, 1):
            preprocess(replace(job, shard=(number, 2)), part)
        assert merge(parts, tmp_path / "merged")["lost"] == whole["lost"]


def test_a_lost_character_in_a_long_document(tmp_path: Path) -> None:
    """Parts of one document count once; a document without one in between starts anew."""
    backend = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "é": 2}, []))
    backend.normalizer = normalizers.NFD()  # é becomes two characters, of which one is lost
    backend.add_tokens(["ö"])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_manifest(tmp_path, source="a test", eod="<eos>")
    parts = [("aé", True, False), ("é é", False, True), ("aö", True, True), ("é", True, True)]
    texts = [Text(text, text.encode(), "x", first, last) for text, first, last in parts]
    count = LostCharacters(load_tokenizer(tmp_path)).count
    assert count(texts[:1]) == ({"é": 1}, 1)
    assert count(texts[1:]) == ({"é": 3, " ": 1}, 1)


@pytest.mark.parametrize("token", [["<eos>"], 3, {"content": 3}])
def test_an_end_token_that_is_no_text(tmp_path: Path, token: object) -> None:
    Tokenizer(models.BPE({"<eos>": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: eos_token is .*, not the text of a token"):
        write_manifest(tmp_path, source="a test")


def dropped(path: Path, unit: int | None = None, **options: object) -> tuple[list[str], dict[str, int]]:
    reading = Reading()
    chosen = ReadOptions(**options)  # type: ignore[arg-type]
    found = [item for unit_ in plan([str(path)], chosen, unit) for item in read(unit_, chosen, reading)]
    assert all(isinstance(item, Text) for item in found), found
    return [item.text for item in found if isinstance(item, Text)], dict(reading.dropped)


@pytest.mark.parametrize("unit", [None, 1, 5, 13])
@pytest.mark.parametrize("block", [2, 7, 1 << 22])
def test_line_ends_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int | None, block: int) -> None:
    monkeypatch.setattr(corpus, "BLOCK", block)
    path = tmp_path / "a.txt"
    for separator in ("\n", "\n\n", "\n--\n", "--\n", "\n--"):
        records = ["one", "zwei é", "", "three\rfour", "five"]
        plain = separator.join([*records, ""])
        crlf = plain.replace("\n", "\r\n")
        inside = sum(separator.count("\n") for _ in records)
        for bom in ("", BOM):
            path.write_bytes((bom + crlf).encode())
            found, counts = dropped(path, unit, separator=separator)
            assert found == ["one", "zwei é", "three\rfour", "five"]
            blank = {"blank line" if separator == "\n" else "blank document": 1}
            assert counts == {"carriage return": inside, **blank, **({"byte order mark": 1} if bom else {})}
        path.write_text(plain, newline="")
        assert dropped(path, unit, separator=separator)[0] == found
    path.write_bytes(b"a\r\nb<end>c\r\n<end>")
    assert dropped(path, unit, separator="<end>") == (["a\r\nb", "c\r\n"], {})  # the line ends are text here
    path.write_bytes(b"a\nb\r\n")
    assert dropped(path, unit, separator="\r\n") == (["a\nb"], {})


def test_places_with_line_ends_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 16)
    lines = [b"\xff" if number in (8, 24, 40) else b"document" for number in range(1, 41)]
    (tmp_path / "a.txt").write_bytes(b"\r\n".join(lines))
    for unit in (1, 30, 64, 1000):
        found = items(tmp_path, unit_bytes=unit, options=ReadOptions(separator="\n"))
        places = [item.place.rpartition(" ")[2] for item in found if not isinstance(item, Text)]
        assert places == ["8", "24", "40"]


def test_byte_order_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"{BOM}text{BOM}\r\n", newline="")
    assert dropped(path) == ([f"text{BOM}\r\n"], {"byte order mark": 1})
    path.write_text(BOM)
    assert bad(path) == [f"{path}: empty"]
    path.write_bytes(codecs.BOM_UTF16_LE + "ab".encode("utf-16-le"))
    assert bad(path) == [f"{path}: not UTF-8 (byte 0xff at 0: this is UTF-16)"]
    lines = tmp_path / "a.jsonl"
    lines.write_text(BOM + line("a") + "\n \r\n" + line("b"), newline="")
    assert dropped(lines) == (["a", "b"], {"byte order mark": 1, "blank line": 2})
    lines.write_text(BOM + "\n" + line("b"))
    assert dropped(lines) == (["b"], {"byte order mark": 1, "blank line": 1})
    monkeypatch.setattr(corpus, "PIECE", 50)
    path.write_text(BOM + "ab cd " * 30)
    found, counts = dropped(path)
    assert ("".join(found), counts) == ("ab cd " * 30, {"byte order mark": 1})


def test_what_was_left_out_stands_in_summary_manifest_and_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(BOM + line("a") + "\n" + line(""))
    for number in range(20):
        (source / f"{number:02d}.png").write_bytes(b"12")
    (source / ".hidden").write_text("x")
    common = ["--quiet", "--processes", "1", "--tokenizer", TOKENIZER, "--input", str(source)]
    assert tool("preprocess_data").main([*common, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for text in ("20 unknown ending", "00.png", "1 hidden", "1 × blank line", "1 × byte order mark", "1 empty"):
        assert text in printed
    manifest = read_json(tmp_path / "out.json")
    assert manifest["skipped"] == {"empty": 1}
    assert manifest["dropped"] == {"blank line": 1, "byte order mark": 1}
    assert manifest["left_out"]["hidden"] == {"files": 1, "bytes": 1, "first": [str(source / ".hidden")]}
    unknown = manifest["left_out"]["unknown ending"]
    assert (unknown["files"], unknown["bytes"], len(unknown["first"])) == (20, 40, 10)
    listed = [json.loads(row) for row in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert sorted(row["place"] for row in listed if row["reason"] == "unknown ending") == sorted(
        str(path) for path in source.glob("*.png")
    )
    for number in (1, 2):
        shard = [*common, "--output", str(tmp_path / "s"), "--shard", f"{number}/2"]
        (source / "b.jsonl").write_text(line("b" * 9) * 20_000)
        assert tool("preprocess_data").main(shard) == 0
    shards = [str(tmp_path / f"s-0000{number}-of-00002") for number in (1, 2)]
    assert tool("merge_datasets").main(["--output", str(tmp_path / "m"), *shards]) == 0
    assert read_json(tmp_path / "m.json")["left_out"] == manifest["left_out"]
    assert read_json(tmp_path / "m.json")["dropped"] == manifest["dropped"]


def test_output_in_the_input_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing the command writes there is input: not of this run, not when it resumes, not of a later one."""
    from oryx_megatron.data import preprocess as module

    (tmp_path / "a.jsonl").write_text(line("a") + line(""))
    (tmp_path / "b.jsonl").write_text(line("b"))
    job = Job(inputs=(str(tmp_path),), tokenizer=TOKENIZER, unit_bytes=1, on_error="skip")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.IndexedWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess(job, tmp_path / "out")
    assert (tmp_path / "out.work").is_dir()
    assert preprocess(job, tmp_path / "out")["documents"] == 2
    assert (tmp_path / "out.skipped.jsonl").exists()
    for name, overwrite in (("out", True), ("other", False)):
        manifest = preprocess(job, tmp_path / name, overwrite=overwrite)
        assert (manifest["documents"], manifest["skipped"]) == (2, {"empty": 1})
    assert manifest["left_out"]["list of what a run left out"]["first"] == [str(tmp_path / "out.skipped.jsonl")]
    # A user's own file of such a name is input.
    (tmp_path / "mine.skipped.jsonl").write_text(line("mine"))
    assert preprocess(job, tmp_path / "third")["documents"] == 3


def test_a_changed_corpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oryx_megatron.data import preprocess as module

    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(line("a"))
    job = Job(inputs=(str(source),), tokenizer=TOKENIZER)
    with monkeypatch.context() as patch:
        patch.setattr(module.IndexedWriter, "finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(job, tmp_path / "out")
    (source / "b.jsonl").write_text(line("b"))
    with pytest.raises(DataError, match=r"--restart to begin again \(.*b\.jsonl is new\)"):
        preprocess(job, tmp_path / "out")
    (source / "b.jsonl").unlink()
    (source / "a.jsonl").write_text(line("aa"))
    with pytest.raises(DataError, match=r"a\.jsonl was changed since\)"):
        preprocess(job, tmp_path / "out")
    (source / "a.jsonl").rename(source / "c.jsonl")
    with pytest.raises(DataError, match=r"c\.jsonl is new\)"):
        preprocess(job, tmp_path / "out")
