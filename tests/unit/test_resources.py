"""What ships is found by the same name in any folder, after what lies there."""

from pathlib import Path

import pytest

from oryx_megatron import resources
from oryx_megatron.config import load_run
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def test_folders_of_a_checkout() -> None:
    for name in ("configs", "tokenizers", "launch", "tools"):
        assert resources.folder(name) == ROOT / name


def test_folders_of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inside the package; what another package put beside it in site-packages is not ours."""
    (tmp_path / "tokenizers").mkdir()
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    assert resources.folder("tokenizers") == tmp_path / "oryx_megatron" / "tokenizers"


def test_names_work_in_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_run("configs/run/quickstart.yaml").model.name == "tiny-gdn"
    assert load_tokenizer("tokenizers/stdlib-8k").vocab_size == 8192
    (tmp_path / "configs/run").mkdir(parents=True)
    (tmp_path / "configs/run/quickstart.yaml").write_text(
        (ROOT / "configs/run/quickstart.yaml").read_text() + "seed: 9\n"
    )
    assert load_run("configs/run/quickstart.yaml").seed == 9  # the user's own comes first


@pytest.mark.parametrize(
    "name", ["configs/run/none.yaml", "configs/../pyproject.toml", "none/configs/run/quickstart.yaml"]
)
def test_what_does_not_ship_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert resources.shipped(name) == Path(name)
    with pytest.raises(ConfigError, match="no such config file"):
        load_run(name)
    with pytest.raises(DataError, match="tokenizers/mine does not exist"):
        load_tokenizer("tokenizers/mine")
