"""What a launcher left in the environment: every rank is known, or the command ends in a line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from oryx_megatron import ranks
from oryx_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets `NAME=value …`, and nothing else that a launcher sets."""

    def use(text: str) -> None:
        for name in (*NAMES, *(name for name, _ in ranks.OTHERS)):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for assignment in text.split():
            monkeypatch.setenv(*assignment.split("="))

    return use


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("WORLD_SIZE=1", None),
        ("WORLD_SIZE= RANK=", None),
        ("WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1", None),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=8", None),  # a batch script
        ("RANK=0 WORLD_SIZE=1", ranks.Launch(0, 1, 0)),
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4", ranks.Launch(5, 8, 1)),
        ("RANK=5 WORLD_SIZE=8", ranks.Launch(5, 8, 0)),
        ("RANK=5 WORLD_SIZE=8 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2", ranks.Launch(5, 8, 0)),
    ],
)
def test_launches(environment: Callable[[str], None], text: str, expected: ranks.Launch | None) -> None:
    environment(text)
    assert ranks.read() == expected
    assert ranks.world_size() == (1 if expected is None else expected.size)


CONTRADICTIONS = [
    ("WORLD_SIZE=8", r"WORLD_SIZE=8 is set, but RANK is not: .*unset WORLD_SIZE"),
    ("WORLD_SIZE=8 LOCAL_RANK=0", r"WORLD_SIZE=8 is set, but RANK is not"),
    ("WORLD_SIZE=8 LOCAL_RANK=9", r"WORLD_SIZE=8 is set, but RANK is not"),
    ("WORLD_SIZE=0", r"WORLD_SIZE='0' is no whole number from 1 up"),
    ("WORLD_SIZE=-8", r"WORLD_SIZE='-8' is no whole number from 1 up"),
    ("WORLD_SIZE=eight", r"WORLD_SIZE='eight' is no whole number"),
    ("WORLD_SIZE=8.0 RANK=0", r"WORLD_SIZE='8.0' is no whole number"),
    ("RANK=0", r"RANK=0 is set, but WORLD_SIZE is not: .*unset RANK"),
    ("RANK=3 LOCAL_RANK=3", r"RANK=3 is set, but WORLD_SIZE is not"),
    ("RANK=-1 WORLD_SIZE=2", r"RANK='-1' is no whole number from 0 up"),
    ("RANK=x WORLD_SIZE=2", r"RANK='x' is no whole number"),
    ("RANK=8 WORLD_SIZE=8", r"RANK=8 is no rank of WORLD_SIZE=8"),
    ("LOCAL_RANK=3", r"LOCAL_RANK=3 is set, but RANK is not"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=a", r"LOCAL_RANK='a' is no whole number"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", r"LOCAL_RANK=2 is no rank of WORLD_SIZE=2"),
    ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=4 LOCAL_WORLD_SIZE=4", r"LOCAL_RANK=4 is no rank of LOCAL_WORLD_SIZE=4"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4", r"LOCAL_WORLD_SIZE=4 is more than WORLD_SIZE=2"),
    ("SLURM_PROCID=1 SLURM_NTASKS=2", r"SLURM_PROCID=1 is set, but RANK is not"),
    ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2", r"SLURM_STEP_NUM_TASKS=2 is set, but RANK is not: .*by srun"),
    ("OMPI_COMM_WORLD_SIZE=4", r"OMPI_COMM_WORLD_SIZE=4 is set, but RANK is not: .*by mpirun"),
]


@pytest.mark.parametrize(("text", "expected"), CONTRADICTIONS, ids=[text for text, _ in CONTRADICTIONS])
def test_contradictions(environment: Callable[[str], None], text: str, expected: str) -> None:
    environment(text)
    with pytest.raises(ConfigError, match=f"^{expected}") as caught:
        ranks.read()
    assert caught.value.rank_local  # so that it is shown whatever RANK is
    assert "\n" not in str(caught.value)


def tool(name: str) -> ModuleType:
    return importlib.import_module(f"oryx_megatron.tools.{name}")


@pytest.mark.parametrize("text", ["WORLD_SIZE=8", "RANK=1", "RANK=x WORLD_SIZE=8", "SLURM_PROCID=1"])
def test_commands_refuse_a_launch_that_is_not_theirs(
    environment: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    """Every command that takes part in a launch says so before it reads or writes anything else."""
    from oryx_megatron import health
    from oryx_megatron.eval import __main__ as evaluation
    from oryx_megatron.train import __main__ as training

    out = tmp_path / "out"
    config = str(ROOT / "configs/run/quickstart.yaml")
    for main, arguments in (
        (training.main, [config, f"output_dir={out}"]),
        (training.main, [config, f"output_dir={out}", "--dry-run"]),
        (evaluation.main, ["perplexity", str(out)]),
        (tool("generate").main, [str(out), "--prompt", "x"]),
        (health.main, [config, f"output_dir={out}"]),
    ):
        if main is health.main and text.startswith("SLURM"):
            continue  # it is started by srun
        environment(text)
        assert main(arguments) == 2
        shown = capsys.readouterr().err.strip()
        assert shown.startswith(("error: ", "error on rank "))
        assert text.split("=")[0] in shown
        assert "\n" not in shown
    assert not out.exists()


def test_dry_run_for_other_ranks(environment: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    """`--world-size` says for how many: what is left in the environment does not matter."""
    from oryx_megatron.train import __main__ as training

    environment("WORLD_SIZE=3 LOCAL_RANK=2")
    command = [str(ROOT / "configs/run/quickstart.yaml"), "--dry-run", "--config-only", "--world-size", "2"]
    assert training.main(command) == 0
    assert "is valid for 2 ranks" in capsys.readouterr().out
