"""The wheel alone, in an environment and a folder of its own: every command, and tokens to export and text.

Dependencies come from the environment that runs the tests, by a .pth file; the checkout is out of sight.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from oryx_megatron import __version__
from oryx_megatron.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("oryx_megatron", "configs", "tokenizers", "launch", "tools")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files beside the source."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source))
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip("--python", str(folder / "bin/python"), "install", "--no-index", "--no-deps", "--no-compile", str(wheel))
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def run(installed: Path, folder: Path, *command: str, code: int = 0) -> str:
    """Standard output of a command of the environment in a folder; it must end with `code`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON")}
    environment |= {"PATH": f"{installed}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + (done.stderr if code else "")


def test_the_wheel_holds_all_files(wheel: Path) -> None:
    """Every file of the repository that a run can need, as it is in the repository."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        for part in PARTS:
            tracked = [path for path in (ROOT / part).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
            for path in tracked:
                name = path.relative_to(ROOT).as_posix()
                inside = name if part == "oryx_megatron" else f"oryx_megatron/{name}"
                if name != "tools/quickstart.py":
                    assert inside in held, inside
                    assert archive.read(inside) == path.read_bytes(), inside
        metadata = archive.read(f"oryx_megatron-{__version__}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch<" in metadata
    assert not any(name.startswith(("configs", "tests", "tools", "launch")) for name in held)


TINY = (
    "model.num_layers=2 model.hidden_size=32 model.ffn_hidden_size=48 model.num_heads=4 model.num_kv_heads=2 "
    "model.qk_head_dim=8 model.v_head_dim=8 data.blend=[data/mine] data.sequence_length=64 modes.chunk=16 "
    "parallel.tensor=1 train.iterations=2 schedule.warmup=0 checkpoint.interval=0 evaluation.interval=0 "
    "logging.tensorboard=false output_dir=run"
)


def test_first_hour_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """No checkout, no network: what ships is found by the same names as in the repository."""

    def oryx(text: str) -> str:
        return run(installed, tmp_path, str(installed / "oryx"), *shlex.split(text))

    where = run(installed, tmp_path, str(installed / "python"), "-c", "import oryx_megatron as o; print(o.__file__)")
    assert where.startswith(str(installed.parent))
    assert "1.4b-gdn" in oryx("arch 1.4b-gdn")
    (tmp_path / "mine.txt").write_text("\n".join(f"def f{i}(x):\n    return x + {i % 7}\n" for i in range(900)))
    oryx(
        r"data preprocess --input mine.txt --separator '\n\n' --quiet --processes 1 --tokenizer tokenizers/stdlib-8k "
        "--output data/mine"
    )
    oryx(f"train configs/run/quickstart.yaml {TINY} --dry-run")
    oryx(f"train configs/run/quickstart.yaml {TINY}")
    assert "iteration_0000002" in oryx("inspect run")
    oryx("convert to-hf run export")
    assert json.loads((tmp_path / "export/config.json").read_text())["model_type"] == "oryx"
    assert "recurrent" in oryx("eval perplexity run --data data/mine --plans recurrent --batches 1")
    assert oryx("generate run --prompt 'def f' --new-tokens 3").startswith("def f")
    manifest = json.loads((tmp_path / "run/checkpoints/iteration_0000002/manifest.json").read_text())
    assert manifest["versions"]["oryx-megatron"] == __version__
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "data", "run", "export"}


def test_commands_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Each explains itself from any folder; launch scripts are there and use this interpreter."""
    oryx, python = str(installed / "oryx"), str(installed / "python")
    listed = run(installed, tmp_path, oryx, "--help")
    for name in COMMANDS:
        assert name in listed
        assert len(run(installed, tmp_path, oryx, *name.split(), "--help").splitlines()) > 3, name
    assert __version__ in run(installed, tmp_path, oryx, "--version")
    assert "did you mean `train`" in run(installed, tmp_path, oryx, "trian", code=2)
    assert "`oryx data preprocess`" in run(installed, tmp_path, oryx, "data", code=2)
    assert "did you mean `data preprocess`?" in run(installed, tmp_path, oryx, "data", "preproces", code=2)
    assert "usage: oryx plan" in run(installed, tmp_path, oryx, "plan", "--help")
    assert "no such config file" in run(installed, tmp_path, oryx, "launch", "--ranks", "1", "none.yaml", code=2)
    assert "usage" in run(installed, tmp_path, python, "-m", "oryx_megatron.tools.generate", "--help")
    assert "usage: oryx" in run(installed, tmp_path, python, "-m", "oryx_megatron", "--help")


@pytest.mark.parametrize(
    ("words", "expected"), [("tr", "train"), ("data ''", "inspect merge preprocess split"), ("data m", "merge")]
)
def test_completion(capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert main(["--completion", "bash"]) == 0
    script = f'{capsys.readouterr().out}\nset -- {words}\nCOMP_WORDS=(oryx "$@") COMP_CWORD=$#\n_oryx\n'
    done = subprocess.run(
        ["bash", "-c", script + 'echo "${COMPREPLY[*]}"'], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize(
    ("words", "expected"), [("oryx data ''", "inspect merge preprocess split"), ("oryx train ''", "")]
)
def test_completion_in_zsh(capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert main(["--completion", "zsh"]) == 0
    stubs = "compdef() {}; _files() {}; compadd() { print -r -- ${(oP)2} }\n"
    script = f"{stubs}{capsys.readouterr().out}\nwords=({words}) CURRENT=3\n_oryx\n"
    done = subprocess.run(["zsh", "-fc", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == expected
