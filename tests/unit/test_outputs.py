"""Outputs never replace an input or what is not ours; what is ours only when told to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_data_tools import ROOT, tool

from oryx_megatron.atomic import exchange
from oryx_megatron.data.files import LISTING, appearing, check_output, is_marked, read_json
from oryx_megatron.data.indexed import open_dataset
from oryx_megatron.errors import DataError

TOKENIZER = ROOT / "tokenizers" / "stdlib-8k"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "hello there"}\n{"text": "again"}\n{"text": "and more"}\n')
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """The one line of a command that must fail, and must change no file below the current folder."""

    def state() -> dict[str, tuple[int, bytes | str]]:
        found: dict[str, tuple[int, bytes | str]] = {}
        for path in sorted(Path(".").rglob("*")):
            is_link = path.is_symlink()
            if is_link or path.is_file():
                found[str(path)] = (path.lstat().st_ino, os.readlink(path) if is_link else path.read_bytes())
        return found

    before = state()
    capsys.readouterr()
    assert tool(name).main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert state() == before
    return printed.err


def preprocess(output: str, *more: str, source: str = "in.jsonl") -> list[str]:
    common = ["--quiet", "--processes", "1", "--tokenizer", str(TOKENIZER)]
    return [*common, "--input", source, "--output", output, *more]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    "way", ["the same", "relative", "a link to it", "it is a link", "a hard link", "in a folder", "among globbed"]
)
def test_an_input_is_never_an_output(
    here: Path, capsys: pytest.CaptureFixture[str], way: str, overwrite: tuple[str, ...]
) -> None:
    shutil.copy("in.jsonl", "corpus.json")
    source, output = "corpus.json", "corpus"
    if way == "relative":
        Path("d").mkdir()
        source = "d/../corpus.json"
    elif way == "a link to it":
        os.symlink("corpus.json", "in2.json")
        source = "in2.json"
    elif way == "it is a link":
        os.symlink("corpus.json", "out.json")
        output = "out"
    elif way == "a hard link":
        os.link("corpus.json", "out.json")
        output = "out"
    elif way == "in a folder":
        Path("d").mkdir()
        shutil.move("corpus.json", "d/corpus.json")
        source, output = "d", "d/corpus"
        overwrite = (*overwrite, "--endings", ".json")
    if way == "among globbed":
        line = refused(
            capsys, "preprocess_data", *preprocess(output, "--shard", "1/1", *overwrite, source="./" + source)
        )
    else:
        line = refused(capsys, "preprocess_data", *preprocess(output, *overwrite, source=source))
    assert ("is the input" in line) or ("belongs to no dataset of ours" in line)
    assert output + ".json" in line


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("end", ["bin", "idx", "json", "skipped.jsonl", "work/precious.txt", "work/lock", "work"])
def test_preprocessing_replaces_nothing_foreign(
    here: Path, capsys: pytest.CaptureFixture[str], end: str, overwrite: tuple[str, ...]
) -> None:
    foreign = Path(f"model.{end}")
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text('{"text": "my own"}\n')
    line = refused(capsys, "preprocess_data", *preprocess("model", *overwrite))
    if end != "work/lock":
        assert f"model.{end.partition('/')[0]}" in line


def test_what_a_kill_at_the_beginning_left_is_ours(here: Path) -> None:
    Path("out.work/parts").mkdir(parents=True)
    Path("out.work/lock").touch()
    assert tool("preprocess_data").main(preprocess("out")) == 0
    assert not Path("out.work").exists()


@pytest.mark.parametrize("kind", ["a dangling link", "a folder", "a FIFO"])
def test_what_is_no_file_is_not_replaced_either(here: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    make = {"a dangling link": lambda p: os.symlink("nowhere", p), "a folder": os.mkdir, "a FIFO": os.mkfifo}
    make[kind]("out.json")
    assert "out.json" in refused(capsys, "preprocess_data", *preprocess("out", "--overwrite"))


def test_our_own_dataset_is_replaced_only_when_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = tool("preprocess_data").main
    assert main(preprocess("a")) == 0
    assert "exists already" in refused(capsys, "preprocess_data", *preprocess("a"))
    assert main(preprocess("a", "--overwrite", "--no-eod")) == 0
    assert open_dataset("a").documents == 3
    # Another file under the name of ours is not ours.
    Path("a.bin").write_bytes(b"weights")
    assert "a.bin exists and belongs to no dataset of ours" in refused(
        capsys, "preprocess_data", *preprocess("a", "--overwrite")
    )


@pytest.mark.parametrize("name", [".", "..", "/", "x/", "./", "x/.."])
def test_an_output_that_is_a_folder(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path("x").mkdir()
    assert "is a folder; name a dataset in it" in refused(capsys, "preprocess_data", *preprocess(name))


def test_merge_and_split(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert tool("preprocess_data").main(preprocess(name)) == 0
    for end in ("bin", "idx", "json"):
        Path(f"mine.{end}").write_text("{}")
        for output, command, *arguments in (
            ("mine", "merge_datasets", "--output", "mine", "a", "b"),
            ("mine", "split_dataset", "a", "mine=1", "other=1", "--output", "x"),
        ):
            if command == "split_dataset":
                os.rename(f"mine.{end}", f"x_mine.{end}")
            for more in ([], ["--overwrite"]):
                assert f"{output}.{end} exists and belongs" in refused(capsys, command, *arguments, *more)
        Path(f"x_mine.{end}").unlink()
    os.symlink("a.bin", "l.bin")
    os.link("a.idx", "h.idx")
    for output in ("l", "h", "./a", str(here / "b")):
        line = refused(capsys, "merge_datasets", "--overwrite", "--output", output, "a", "b")
        assert "is one of the inputs" in line
    os.symlink("a.idx", "a_x.idx")
    assert "is the input" in refused(capsys, "split_dataset", "a", "x=1", "y=1", "--overwrite")
    assert "cannot hold `/`" in refused(capsys, "split_dataset", "a", "../a=1", "y=1", "--overwrite")
    assert tool("merge_datasets").main(["--output", "c", "a", "b"]) == 0
    assert "exists already" in refused(capsys, "merge_datasets", "--output", "c", "a", "b")
    assert tool("merge_datasets").main(["--output", "c", "b", "a", "--overwrite"]) == 0


def test_training_a_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (ROOT / "README.md").read_text()
    Path("text.txt").write_text(words)
    train = ["--input", "text.txt", "--vocab-size", "400", "--held-out", "0", "--output"]
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "manifest.json", "tokenizer.tiktoken"):
        Path(name[:12]).mkdir()
        Path(name[:12], name).write_text('{"my": "file"}')
        for more in ([], ["--overwrite"]):
            assert f"{name} exists and was not trained here" in refused(
                capsys, "train_tokenizer", *train, name[:12], *more
            )
        shutil.rmtree(name[:12])
    shutil.copytree(TOKENIZER, "adopted")
    manifest = read_json("adopted/manifest.json")
    manifest.pop("training", None)
    Path("adopted/manifest.json").write_text(json.dumps(manifest))
    assert "was not trained here" in refused(capsys, "train_tokenizer", *train, "adopted", "--overwrite")
    assert tool("train_tokenizer").main([*train, "t"]) == 0
    Path("t/notes.txt").write_text("mine")
    assert "holds a tokenizer already" in refused(capsys, "train_tokenizer", *train, "t")
    assert tool("train_tokenizer").main([*train, "t", "--kind", "byte-level", "--overwrite"]) == 0
    assert sorted(os.listdir("t")) == ["manifest.json", "notes.txt", "tokenizer.json", "tokenizer_config.json"]
    assert "is not a folder" in refused(capsys, "train_tokenizer", *train, "text.txt", "--overwrite")


def test_adopting(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t").mkdir()
    shutil.copy(TOKENIZER / "tokenizer.model", "t")
    Path("t/manifest.json").write_text('{"name": "my web app", "icons": []}')
    assert "is not the manifest of a tokenizer" in refused(capsys, "train_tokenizer", "--adopt", "t")
    Path("t/manifest.json").unlink()
    assert tool("train_tokenizer").main(["--adopt", "t"]) == 0


def test_pictures_are_replaced_only_when_they_are_ours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("preprocess_data").main(preprocess("a")) == 0
    for ending in ("png", "svg", "pdf"):
        plot = ["a", "--plot", f"p.{ending}"]
        assert tool("inspect_dataset").main(plot) == 0
        assert is_marked(Path(f"p.{ending}"))
        assert "exists already" in refused(capsys, "inspect_dataset", *plot)
        assert tool("inspect_dataset").main([*plot, "--overwrite"]) == 0
        Path(f"p.{ending}").write_bytes(b"holiday")
        assert "is not an earlier output" in refused(capsys, "inspect_dataset", *plot, "--overwrite")
    os.link("a.bin", "a.png")
    assert "is the input" in refused(capsys, "inspect_dataset", "a", "--plot", "a.png", "--overwrite")
    Path("folder.png").mkdir()
    assert "is a folder" in refused(capsys, "inspect_dataset", "a", "--plot", "folder.png", "--overwrite")
    steps = [{"kind": "step", "iteration": i, "loss": 2.0, "tokens": 8} for i in (1, 2)]
    Path("r").mkdir()
    Path("r/metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    for ending in ("png", "svg", "pdf", "html"):
        plot = ["r", "--out", f"r.{ending}"]
        assert tool("plot_run").main(plot) == 0
        assert "exists already" in refused(capsys, "plot_run", *plot)
        assert tool("plot_run").main([*plot, "--overwrite"]) == 0
        Path(f"r.{ending}").write_bytes(b"holiday")
        assert "is not an earlier output" in refused(capsys, "plot_run", *plot, "--overwrite")


def test_results_of_evaluations(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from oryx_megatron.eval.__main__ import main

    Path("results").mkdir()
    for command, name in (("perplexity", "perplexity.json"), ("retrieval", "retrieval.png")):
        Path("results", name).write_text("mine")
        assert main([command, "nowhere", "--output", "results", "--overwrite"]) == 2
        assert f"results/{name} exists and is not an earlier output" in capsys.readouterr().err


def make(target: Path, **options: bool) -> None:
    with appearing(target, **{"overwrite": False, **options}) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text("a")
        (folder / "sub" / "b.txt").write_text("b")


def test_folders_are_replaced_only_as_they_were_made(tmp_path: Path) -> None:
    target = tmp_path / "t"
    make(target)
    with pytest.raises(DataError, match="exists already; choose another name or pass --overwrite"):
        make(target)
    make(target, overwrite=True)
    assert sorted(os.listdir(target)) == [LISTING, "a.txt", "sub"]
    for change, message in (
        (lambda: (target / "sub" / "mine").write_text("x"), "holds sub/mine, which this command did not write"),
        (lambda: os.symlink("/", target / "root"), "holds root, which this command did not write"),
        (lambda: (target / "a.txt").write_text("b"), r"holds a\.txt, which was changed since"),
        (lambda: (target / LISTING).unlink(), "nothing tells that this command wrote them"),
    ):
        change()
        with pytest.raises(DataError, match=message):
            make(target, overwrite=True)
        shutil.rmtree(target)
        make(target)
    with (
        pytest.raises(DataError, match="is, or holds, the input"),
        appearing(tmp_path, overwrite=True, inputs=[target]),
    ):
        pass
    os.symlink(target, tmp_path / "link")
    with pytest.raises(DataError, match="is not a folder that this command made"):
        make(tmp_path / "link", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["link", "t"]


def fill(target: Path, content: str) -> None:
    """A folder of one file, as commands make theirs."""
    with appearing(target, overwrite=True) as folder:
        (folder / "file").write_text(content)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Where the file system swaps names in one step, a kill leaves the old one or the new; a failure always the old."""
    target = tmp_path / "out"
    fill(target, "old")
    if at_once:
        (tmp_path / "a").mkdir()
        if not exchange(tmp_path / "a", target):
            pytest.skip("this file system cannot swap names")
        exchange(tmp_path / "a", target)
        (tmp_path / "a").rmdir()
        if (child := os.fork()) == 0:  # killed before anything is cleared away
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: os._exit(9))
            monkeypatch.setattr(Path, "rename", lambda *_: os._exit(1))
            fill(target, "new")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert (target / "file").read_text() == "new"
        left = [path for path in tmp_path.iterdir() if path != target]
        assert [(path / "file").read_text() for path in left] == ["old"]
    else:
        rename, calls = Path.rename, []

        def fail_once(path: Path, to: Path) -> Path:
            calls.append(path)
            if len(calls) == 2:
                raise PermissionError(13, "Permission denied", str(to))
            return rename(path, to)

        monkeypatch.setattr("oryx_megatron.data.files.exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", fail_once)
        with pytest.raises(PermissionError):
            fill(target, "new")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (target / "file").read_text() == "old"
        fill(target, "new")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (target / "file").read_text() == "new"


def test_names_are_swapped(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot swap names")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_an_output_made_meanwhile_is_kept(tmp_path: Path) -> None:
    def late() -> None:
        with appearing(tmp_path / "t", overwrite=False) as folder:
            (folder / "a").write_text("a")
            (tmp_path / "t").mkdir()
            (tmp_path / "t" / "mine").write_text("mine")

    with pytest.raises(DataError, match="exists already"):
        late()
    assert (tmp_path / "t" / "mine").read_text() == "mine"
    assert os.listdir(tmp_path) == ["t"]


def test_case_does_not_hide_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that do not tell letter case apart: there `samefile` says so."""
    (tmp_path / "A.json").write_text("{}")
    monkeypatch.setattr(os.path, "samefile", lambda a, b: str(a).lower() == str(b).lower())
    with pytest.raises(DataError, match="is the input"):
        check_output(tmp_path / "a.json", ours=lambda _: True, overwrite=True, inputs=[tmp_path / "A.json"])
