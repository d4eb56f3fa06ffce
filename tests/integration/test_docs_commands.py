"""Commands of README.md and docs/ as their pages show them, in order, on small text and a small model.

Blocks that are marked with this file are run, one test each; SMALL says what stands in for what is large. Our commands
run in this process, where torch is loaded already; the others in bash.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oryx_megatron.data.train_tokenizer import train_byte_level
from oryx_megatron.testing.project import VOCABULARY, synthetic_texts, tiny_project

sys.path.append(str(Path(__file__).resolve().parents[1]))
from doc_commands import ROOT, Block, all_blocks, ours

HERE = "tests/integration/test_docs_commands.py"
BLOCKS = [block for block in all_blocks() if block.ran and block.mark.startswith(HERE)]
RECIPE = "model=tiny-gdn model.vocab_size=300 'data.blend=[data/web,data/code]' 'data.split=[8,2,0]'"
SMALL = (
    (r"--vocab-size 32768", "--vocab-size 300"),
    (r"(?<=-m oryx_megatron.train )configs/run/quickstart.yaml(?! .*--config-only)", "run.yaml"),
    (r"(?<=--run )configs/run/quickstart.yaml", "run.yaml"),
    (
        r"mine.yaml --dry-run",
        f"mine.yaml {RECIPE} output_dir=runs/new --dry-run",
    ),  # runs/pretrain-1.4b-gdn is not this one
    (r"--lengths [\d ]+", "--lengths 96 "),
    (r"(oryx_megatron.monitor .*)", r"\1 --once"),
    (r"(launch/submit.py .*)", r"\1 --print"),
    (r"(oryx router \S+)", r"\1 --texts 8 --held-out 4 --epochs 1"),
    (r"\bRUN\b", "runs/quickstart"),
    (r"\bEXPORT\b", "exports/routed"),
    (r"\bFOLDER\b", "adopted"),
    (r'"…"', '"a"'),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: texts, tokens, a run of a small model, a tokenizer of others."""
    folder = tmp_path_factory.mktemp("docs")
    config = tiny_project(folder)
    run = yaml.safe_load(config.read_text()) | {"output_dir": "runs/quickstart"}
    run["data"]["split"] = [8, 2, 0]
    run["modes"]["chunk"] = 4  # ratio:0.1 wants ten chunks in 48 tokens
    config.write_text(yaml.safe_dump(run, sort_keys=False))
    shutil.copytree(ROOT / "configs", folder / "configs")
    texts = synthetic_texts()
    for name in ("corpus", "web", "code"):
        (folder / name).mkdir()
        for number, text in enumerate(texts):
            (folder / name / f"{number}.txt").write_text(f"{name} {text}")
    (folder / "notes.txt").write_text(texts[0])
    (folder / "runs").mkdir()
    for name in ("pretrain-1.4b-gdn", "trial"):
        (folder / "runs" / name).symlink_to("quickstart")
    (folder / "data").mkdir()
    for name in ("stdlib", "pages"):
        for ending in ("bin", "idx"):
            shutil.copy(folder / f"data.{ending}", folder / f"data/{name}.{ending}")
    train_byte_level(texts, folder / "adopted", VOCABULARY, source="synthetic")
    return folder


def in_process(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ours; it must end well."""
    from oryx_megatron import parallel

    module, *arguments = ours(line) or []
    if module.startswith("launch/"):
        monkeypatch.syspath_prepend(ROOT / "launch")
        module = "submit"
    elif (ROOT / module.replace(".", "/") / "__main__.py").is_file():
        module += ".__main__"
    monkeypatch.setattr(sys, "argv", [line.split(" --")[0]])
    try:
        assert importlib.import_module(module).main(arguments) == 0, line
    finally:
        parallel.destroy()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{Path(block.page).stem}-{block.line}")
def test_runs(block: Block, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command ends well; what the page says that it prints, it prints."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    shutil.rmtree("results", ignore_errors=True)  # pages write to one of this name
    if block.language == "python":
        exec(compile(block.text, block.page, "exec"), {})
        return
    as_written = True
    for written in block.commands:
        line = written
        for pattern, small in SMALL:
            line = re.sub(pattern, small, line)
        as_written &= line == written
        if line.startswith("torchrun ") or ours(line) is None:
            path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            environment = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(project)}
            done = subprocess.run(["bash", "-euc", line], env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        else:
            in_process(line, monkeypatch)
    printed = " ".join(capsys.readouterr().out.split())
    for line in block.output if as_written else ():
        assert " ".join(line.split()) in printed


def test_all_are_run() -> None:
    assert len(BLOCKS) > 20
    assert all(block.commands or block.language == "python" for block in BLOCKS)
    assert sum(len(block.output) for block in BLOCKS) > 30
