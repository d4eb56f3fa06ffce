"""README's second step and docs/api.md as their code blocks say it; and commands outside the environment."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oryx_megatron import __version__

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = "train.iterations=4 train.exit_after=4 schedule.warmup=1 evaluation.interval=0 evaluation.batches=1"


def blocks(section: str) -> list[str]:
    """The bash blocks of a section of README.md."""
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert text is not None, section
    found = re.findall(r"^```bash\n(.*?)^```$", text[1], re.MULTILINE | re.DOTALL)
    assert found, section
    return found


def bash(script: str, folder: Path, *, code: int = 0, **more: str) -> str:
    """Output of a script in a folder, in this environment; it must end with `code`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=860)
    assert done.returncode == code, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def text_folder(folder: Path) -> None:
    """`mytext` of about 80 files, 0.7 MB: what Python's help says of the language."""
    (folder / "mytext").mkdir()
    for name, text in pydoc_data.topics.topics.items():
        (folder / "mytext" / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of the section's blocks, as written but for the number of steps."""
    folder = tmp_path_factory.mktemp("own")
    text_folder(folder)
    train = "oryx train configs/run/own-text.yaml\n"
    (script,) = blocks("Your own text")
    assert script.count(train) == 1
    return folder, bash(script.replace(train, f"{train.rstrip()} {SHORT}\n"), folder)


def test_own_text(walked: tuple[Path, str]) -> None:
    """Tokens, a model, text, a picture, an export, all under the names that the README gives them."""
    folder, output = walked
    assert {path.name for path in folder.iterdir()} == {"mytext", "tokenizers", "data", "runs", "exports"}
    steps = [json.loads(line) for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert max(step["iteration"] for step in steps) == 4
    assert "\nThe " in output
    assert (folder / "runs/mine.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "exports/mine/config.json").read_text())["model_type"] == "oryx"


def test_dry_run_opens_what_the_run_would(walked: tuple[Path, str]) -> None:
    folder, output = walked
    for line in (
        "tokenizer  tokenizers/mine: sentencepiece, 4,096 tokens for 4,096 rows",
        r"train      data/mine: 2,400 samples of 256 tokens, \d+\.\d\d epochs",
        "valid      data/mine: up to 16 samples",
        "kernels    attention=",
        "start      new weights, seed 1234",
        r"disk       .* GiB free for runs/mine; 3 checkpoints of 0\.0\d GiB",
        "not checked: memory of the GPUs",
    ):
        assert re.search(line, output), line
    resumed = bash(f"oryx train configs/run/own-text.yaml {SHORT} --dry-run", folder)
    assert "start      resumes from iteration 4 of runs/mine/checkpoints" in resumed


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.tokenizer=tokenizers/none", "tokenizers/none does not exist"),
        ("data.tokenizer=tokenizers/stdlib-8k", "tokenizer stdlib-8k has 8192 tokens, model.vocab_size is 4096"),
        ("data.blend=[data/none]", "dataset data/none: data/none.idx is missing"),
        ("data.split=[999,1,0]", "its valid part is empty"),
        ("kernels.attention=flash4", "kernels.attention: flash4 cannot be used here"),
        ("init_from=nowhere", "nowhere"),
    ],
)
def test_dry_run_refuses_what_the_run_would(
    walked: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    expected: str,
) -> None:
    """One line, the same as the run's own; with --config-only no file is opened."""
    from oryx_megatron.train.__main__ import main

    monkeypatch.chdir(walked[0])
    command = ["configs/run/own-text.yaml", "output_dir=runs/other", override, "--dry-run"]
    assert main(command) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert expected in error
    assert main([*command, "--config-only"]) == 0
    assert "checked: the config alone" in capsys.readouterr().out
    assert not Path("runs/other").exists()


def test_dry_run_wants_room(walked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a checkpoint is that of the one on disk, within its indexes; no room for one is an error."""
    from oryx_megatron.config import load_run
    from oryx_megatron.errors import ConfigError
    from oryx_megatron.train import preflight

    folder, _ = walked
    monkeypatch.chdir(folder)
    run = load_run("configs/run/own-text.yaml", SHORT.split())
    (checkpoint,) = Path("runs/mine/checkpoints").iterdir()
    written = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    assert preflight.checkpoint_bytes(run) == pytest.approx(written, rel=0.1)
    free = preflight.checkpoint_bytes(run) - 1
    usage = type(preflight.shutil.disk_usage("."))(2 * free, free, free)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="output_dir runs/mine: a checkpoint takes"):
        preflight._disk(run, Path("runs/mine/checkpoints"), 1)


def test_the_same_on_8_gpus(walked: tuple[Path, str]) -> None:
    """As written, with a dry run for 8 ranks in place of the launch."""
    folder, _ = walked
    (script,) = blocks("The same on 8 GPUs")
    assert script.count("\noryx launch ") == 1
    output = bash(script.replace("\noryx launch ", "\noryx train --dry-run --config-only --world-size 8 "), folder)
    assert output.count("is valid for 8 ranks:\n  tensor 1 × pipeline 1 × context 1 × data 8") == 2
    assert "4,096 tokens for 4,096 rows" in output


@pytest.fixture
def api(walked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The walked folder as working folder, and no process group left behind."""
    from oryx_megatron import parallel

    monkeypatch.chdir(walked[0])
    yield
    parallel.destroy()


def test_docs_of_the_api(api: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The block of docs/api.md as written: an export continues a text as its checkpoint does."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(block, "docs/api.md", "exec"), found)
    output = capsys.readouterr().out
    assert "5 attention" in output
    assert "0.25 Run(start=768, stop=1024, mode=<Mode.ATTENTION: 1>)" in output
    assert re.search(r"attention read \d+% of \d+ tokens: (\d+) of \1 given, 0 of 20 new", output)


def test_the_notebook(api: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, in order."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    found: dict[str, object] = {}
    for number, cell in enumerate(json.loads((ROOT / "docs/first-hour.ipynb").read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), found)
    output = capsys.readouterr().out
    assert "iteration=6, stopped=None" in output
    assert "THE VALUE OF" in re.sub(r" +", " ", output)
    assert "runs:r0-96,a96-128,r128-224,a224-256 0.25" in output


def test_generate_shows_modes(api: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Orange where attention read, from a run and from its export alike; the count goes to standard error."""
    from oryx_megatron.tools.generate import main

    texts = []
    for path in ("runs/mine", "exports/mine"):
        options = ["--prompt", "The value", "--plan", "prompt:runs:r0-3c,a3c-end,new:attention", "--new-tokens", "3"]
        assert main([path, *options, "--temperature", "0", "--colour", "always"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("The\x1b[38;5;208m value")
        assert out.endswith("\x1b[0m\n")
        assert "1 of 2 given, 3 of 3 new" in err
        assert main([path, *options, "--temperature", "0"]) == 0
        plain = capsys.readouterr().out
        assert plain == re.sub(r"\x1b\[[\d;]*m", "", out)  # no terminal, no colour
        texts.append(plain)
    assert texts[0] == texts[1]
    assert main(["runs/mine", "--prompt", "The", "--plan", "prompt:runs:a0-99c,new:attention"]) == 2
    assert "99 characters are more than the 3 of the prompt" in capsys.readouterr().err
    assert main(["exports/mine", "--prompt", "The", "--plan", "sometimes"]) == 2
    assert "a plan is one of attention" in capsys.readouterr().err


def test_importing_is_quick() -> None:
    """Every name is there, and none loads torch before it is used."""
    code = (
        "import sys, oryx_megatron as o\n"
        "from oryx_megatron import Dataset, ModePlan, export, generate, load_model, load_run, train\n"
        "import oryx_megatron.train as package\n"
        "assert package is train and callable(train) and set(o.__all__) <= set(dir(o))\n"
        "assert not hasattr(o, 'nothing')\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_own_text_in_ten_minutes(tmp_path: Path) -> None:
    """Every step as written; the model has learned."""
    text_folder(tmp_path)
    started = time.monotonic()
    bash("\n".join(blocks("Your own text")), tmp_path)
    assert time.monotonic() - started < 600
    lines = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "evaluation" and line["iteration"] == 300]
    assert len(losses) == 3
    assert max(losses) < 5.5  # 8.3 is a uniform guess


@pytest.mark.parametrize(
    "command",
    [
        ["tools/preprocess_data.py", "--help"],
        ["tools/generate.py", "runs/x"],
        ["-m", "oryx_megatron.train", "x.yaml"],
        ["-m", "oryx_megatron", "data", "inspect", "x"],
        ["-m", "oryx_megatron.tools.plan", "x"],
        ["launch/submit.py", "x"],
    ],
)
def test_outside_the_environment(command: list[str]) -> None:
    """A Python without our packages says so and what to do: no traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(
        r"error: this Python \(.*\) is not the environment of oryx_megatron: it lacks torch, .*tqdm; ", line
    )
    assert "source" in line


def test_install_says_how_to_enter() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "install: $(READY)" in makefile
    assert "source $(BIN)/activate" in makefile
    assert "source .venv/bin/activate" in blocks("Install")[0]
    assert __version__ in bash("oryx --version", ROOT)
