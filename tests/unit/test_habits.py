"""What people do by habit: each is one line that names what is at fault and what to do, through the commands' mains."""

from __future__ import annotations

import ast
import bz2
import contextlib
import errno
import gzip
import importlib
import lzma
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import load_run
from oryx_megatron.errors import ConfigError, DataError
from oryx_megatron.resources import folder

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = (folder("configs") / "run/quickstart.yaml").read_text(encoding="utf-8")
TOKENIZER = folder("tokenizers") / "stdlib-8k"
Failing = Callable[..., str]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Failing:
    """Run a command that must fail with one line; gives the line."""
    monkeypatch.chdir(tmp_path)

    def run(module: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["oryx command"])
        assert importlib.import_module(f"oryx_megatron.{module}").main([*map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
        return err[7:-1]

    return run


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            QUICKSTART.encode("utf-16"),
            "cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte: this is UTF-16",
        ),
        (
            QUICKSTART.replace("name:", "name: \xe4").encode("latin-1") + b"\xe4",
            "cannot be read: 'utf-8' codec can't decode byte 0xe4 in position ",
        ),
        (gzip.compress(QUICKSTART.encode()), "invalid start byte: this is gzip, whose name should end in .gz"),
        (QUICKSTART.replace("\ndata:\n", "\ndata:\n\tx: 1\n").encode(), ", line "),
        ((QUICKSTART + "\nseed: 1\nseed: 2\n").encode(), "key `seed` is given twice"),
        (b"", "expected `name: value` lines"),
    ],
    ids=["utf-16", "latin-1", "gzip", "tab", "twice", "empty"],
)
def test_run_files(failing: Failing, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    error = failing("train.__main__", "run.yaml", "--dry-run")
    assert error.startswith("run.yaml")
    assert expected in error


def test_run_files_of_other_editors(tmp_path: Path) -> None:
    """A byte order mark and Windows' line ends change nothing; what Python reads as a number is one."""
    path = tmp_path / "run.yaml"
    path.write_text(QUICKSTART, encoding="utf-8")
    run = load_run(path)
    path.write_bytes(b"\xef\xbb\xbf" + QUICKSTART.replace("\n", "\r\n").encode())
    assert load_run(path) == run
    assert load_run(path, ["train.iterations=1_000", "optimizer.lr=5e-3"]).train.iterations == 1000
    with pytest.raises(
        ConfigError, match=r"train.iterations: expected integer, got 1000000.0 \(float\); write 1000000$"
    ):
        load_run(path, ["train.iterations=1e6"])


def test_names_that_are_nearly_right(failing: Failing, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(QUICKSTART, encoding="utf-8")
    train = "train.__main__"
    assert failing(train, "configs/run/quickstar.yaml").endswith("; did you mean configs/run/quickstart.yaml?")
    assert failing(train, "quickstart").endswith("; did you mean configs/run/quickstart.yaml?")
    assert failing(train, "mien.yaml").endswith("; did you mean mine.yaml?")
    assert failing(train, "else.yaml") == "else.yaml: no such config file"
    assert failing(train, "configs/model/tiny-gdn.yaml").endswith(
        ": this is a model, which a run names as `model: tiny-gdn`; see configs/run"
    )
    assert failing(train, "mine.yaml", "--train.iterations=5", "seed=1") == (
        "unrecognized arguments: --train.iterations=5; fields of a run have no dashes: train.iterations=VALUE; "
        "see oryx command --help"
    )
    assert failing("arch", "configs/run/quickstar.yaml").startswith("configs/run/quickstar.yaml: model: no such config")
    assert failing(train) == "the following arguments are required: config; see oryx command --help"
    with pytest.raises(ConfigError, match="invalid choice"):
        Parser().error("invalid choice")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            gzip.compress(b'{"text": "a"}\n'),
            "a.jsonl:1: not UTF-8 (byte 0x8b at 1 of the line: this is gzip,",
        ),
        ("a.txt", gzip.compress(b"a"), "not UTF-8 (byte 0x8b at 1: this is gzip, whose name should end in .gz)"),
        ("a.txt", lzma.compress(b"a"), "this is xz, whose name should end in .xz"),
        ("a.txt", bz2.compress(b"a" * 99) + b"\xff", "this is bzip2, whose name should end in .bz2"),
        ("a.txt", b"PK\x03\x04\xff", "this is a zip archive, to be unpacked first"),
        ("a.txt", b"%PDF-1.7 \xff", "this is a PDF"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "this is UTF-16"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 (byte 0xe9 at 3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_named_wrong(failing: Failing, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = failing(
        "tools.preprocess_data", "--quiet", "--processes", 1, "--input", name, "--tokenizer", TOKENIZER, "--output", "x"
    )
    assert expected in error
    assert not list(tmp_path.glob("x.[bij]*"))


def test_values_out_of_range(failing: Failing, tmp_path: Path) -> None:
    from oryx_megatron.data.datasets import split
    from oryx_megatron.testing.project import tiny_project

    (tmp_path / "a.txt").write_text("a b c\n")
    data = tiny_project(tmp_path).with_name("data")
    train = ("tools.train_tokenizer", "--input", "a.txt", "--output", "t")
    assert failing(*train, "--vocab-size", 0) == "--vocab-size 0: give a number above 0"
    assert failing(*train, "--vocab-size", "8k").startswith("argument --vocab-size: invalid int value: '8k'; see ")
    model = TOKENIZER / "tokenizer.model"
    error = failing("tools.preprocess_data", "--input", "a.txt", "--output", "x", "--tokenizer", model)
    assert error == f"tokenizer {model} is a file; give its folder {TOKENIZER}"
    for share in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=rf"^part b={share:g}: shares must be above 0, and finite$"):
            split(str(data), {"a": 1.0, "b": share}, str(tmp_path / "out"))


def test_one_long_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer of one document: made, and not measured."""
    from oryx_megatron.tools.train_tokenizer import main

    (tmp_path / "a.txt").write_text("a few words and numbers, 1 2 3\n" * 500)
    assert main(["--input", str(tmp_path / "a.txt"), "--vocab-size", "290", "--output", str(tmp_path / "made")]) == 0
    assert "held out           none: of every 10 documents the last is, and there are fewer" in capsys.readouterr().out


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file may become longer than `size` bytes: what is written beyond fails as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk(failing: Failing, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and nothing under the final name: export, import, dataset, tokenizer, whatever writes."""
    from oryx_megatron import parallel
    from oryx_megatron.hf.convert import export
    from oryx_megatron.testing.project import tiny_project
    from oryx_megatron.train.__main__ import main

    run = str(tiny_project(tmp_path))
    assert main([run, "train.iterations=1", "model.num_layers=1", "data.split=[1,0,0]", "evaluation.plans=[]"]) == 0
    parallel.destroy()
    export(tmp_path / "out", tmp_path / "exported")
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for module, *arguments in (
        ("tools.convert_from_hf", "exported", "made"),
        ("tools.convert_to_hf", "out", "made"),
        ("tools.split_dataset", "data", "a=1", "b=1", "--output", "made"),
        ("tools.plot_run", "out", "--out", "made.png"),
    ):
        with room(1000):
            error = failing(module, *arguments)
        assert re.search(r"made.*: .*(File too large|unexpected pos)", error), (module, error)
        assert sorted(tmp_path.rglob("*")) == before, module

    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert main_guard(full)() == 2
    assert capsys.readouterr().err == "error: No space left on device: make room, or write to another disk\n"


def test_folders_of_others(failing: Failing, tmp_path: Path) -> None:
    """What is no run and no export of ours; a model's name on a hub."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "run.yaml").write_text(QUICKSTART, encoding="utf-8")
    generate = ("tools.generate", "--prompt", "a")
    assert failing(*generate, "other") == "other: model type 'gpt2', not oryx: no export of this project"
    hub = "meta-llama/Llama-3.2-1B"
    assert failing("tools.convert_from_hf", hub, "out") == (
        f"{hub}/config.json cannot be read (No such file or directory); is this a Hugging Face folder? "
        f"One of a hub: hf download {hub} --local-dir FOLDER"
    )
    assert failing("monitor", "run.yaml", "--once") == "run.yaml is a file; give a run folder (the config's output_dir)"
    assert failing("monitor", ".", "--web", "--port", 99999).startswith("--port 99999: bind(): port must be 0-65535; ")


def test_a_run_has_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`oryx arch` takes a run's YAML too, as `oryx plan` does."""
    from oryx_megatron import arch

    path = tmp_path / "run.yaml"
    path.write_text(QUICKSTART, encoding="utf-8")
    assert arch.main([str(path)]) == 0
    of_run = capsys.readouterr().out
    run = load_run(path)
    assert arch.main([run.model.name, "--sequence", str(run.data.sequence_length)]) == 0
    assert capsys.readouterr().out == of_run


def test_groups_of_commands(failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    from oryx_megatron.__main__ import main

    assert main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [line.split("  ")[0] for line in shown.splitlines()[:-1]] == [
        f"oryx data {name}" for name in ("preprocess", "inspect", "merge", "split")
    ]
    assert failing("__main__", "data", "cut").endswith("got `cut`")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("oryx_megatron.config.__main__").main(["--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) < 20
    assert failing("config.__main__", "nonsense").startswith("nonsense is none of the configs that ship")
    assert failing("config.__main__", "a", "nonsense").startswith("unrecognized arguments: nonsense; see ")


def test_messages_name_commands_that_a_wheel_has() -> None:
    """What to do next is said as `oryx …`: a wheel brings no folder tools/."""
    for path in sorted((ROOT / "oryx_megatron").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
        ]
        assert not [text for text in texts if re.search(r"tools/\w+\.py", text)], path


def test_help_names_every_form_of_a_plan() -> None:
    from oryx_megatron.config.plans import FORMS, HELP

    kinds = set(re.findall(r"\b([a-z]+):(?=[A-Za-z\d])", FORMS))
    assert kinds >= {"prefix", "last", "ratio", "every", "runs", "prompt", "router", "layers"}
    assert not [kind for kind in kinds if f"{kind}:" not in HELP]


def test_help_of_launch_fits_the_terminal() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "launch/local.sh"), "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "oryx launch" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_router_s_error_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "oryx_megatron.router", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nothing'} does not exist; give a checkpoint or a run folder\n"
