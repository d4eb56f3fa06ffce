"""The package stays readable: sizes of files and classes, and how far an engine reaches."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "oryx_megatron"
ROOT, TRAIN = PACKAGE.parent, PACKAGE / "train"


def test_sizes() -> None:
    """A file has at most 600 lines, a class at most 300, and the trainer's loop fits a screen."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found[str(path.relative_to(PACKAGE))] = (len(text.splitlines()), 600)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found[f"class {node.name} of {path.relative_to(PACKAGE)}"] = (_lines(node), 300)
            if isinstance(node, ast.FunctionDef) and path.name == "trainer.py" and node.name == "_loop":
                found["the loop"] = (_lines(node), 40)
    named = {"class Trainer of train/trainer.py", "class Callback of train/callbacks/base.py"}
    assert {"train/trainer.py", "hf/modeling_oryx.py", "the loop", *named} <= set(found)
    assert not {name: sizes for name, sizes in found.items() if sizes[0] > sizes[1]}


def _lines(node: ast.ClassDef | ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_the_picture_is_of_these_parts(tmp_path: Path) -> None:
    """docs/images/structure.svg has the parts and the arrows' order of today; its numbers of lines may lag."""
    drawn = tmp_path / "now.svg"
    command = [sys.executable, str(ROOT / "tests" / "structure.py"), str(drawn)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    now, then = drawn.read_text(), (ROOT / "docs" / "images" / "structure.svg").read_text()
    found = [re.findall(r"<!-- ([a-z][\w ()]*) -->", svg) for svg in (now, then)]
    assert "storage" in found[0]
    assert found[0] == found[1], "run: python tests/structure.py docs/images/structure.svg"
    assert "#c0392b" not in now + then  # an arrow against the order


SAME_NAME = {"Dataset": "of oryx_megatron.api: the other one, opened, as a few methods for users"}


def test_one_class_of_a_name() -> None:
    """Who reads or searches for a name finds one thing: a training module is not called as its twin in an export."""
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {"OryxMixer", "OryxTokenMixer", "OryxModel", "OryxGPTModel"} <= set(places)
    assert {name for name, found in places.items() if len(found) > 1} == set(SAME_NAME), places


def test_names_of_test_files_differ() -> None:
    """pytest imports them by name alone, and ranks of a test find its functions so."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_one_callback_a_file() -> None:
    counts = {}
    for path in sorted((TRAIN / "callbacks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bases = [
            [getattr(base, "id", "") for base in node.bases] for node in tree.body if isinstance(node, ast.ClassDef)
        ]
        counts[path.name] = sum("Callback" in names for names in bases)
    assert {"display.py", "events.py", "profile.py"} <= {name for name, count in counts.items() if count == 1}
    assert max(counts.values()) == 1, counts


MAY_NAME_DEEPSPEED = {
    "train/deepspeed.py": "the engine",
    "config/schema.py": "its fields",
    "config/validate.py": "their rules",
    "checkpoint/store.py": "tells its checkpoints from ours",
    "checkpoint/manifest.py": "the packages whose versions are recorded",
    "doctor.py": "the packages that are looked for",
    "__main__.py": "the command that converts its checkpoints",
    "parallel/context.py": "cites DeepSpeed-Ulysses",
}


def test_deepspeed_is_a_plugin() -> None:
    """Patches apart, what runs under `engine: megatron` does not know of it; engines are found by name."""
    naming = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "compat" and "deepspeed" in path.read_text(encoding="utf-8").lower()
    }
    assert naming <= set(MAY_NAME_DEEPSPEED)
    assert "train/deepspeed.py" in naming


@pytest.mark.slow
def test_the_way_of_a_token_is_short() -> None:
    """Files that arrays pass through from corpus to export, as docs/architecture.md counts them."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "structure.py"), "--way"],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count = int(done.stdout.splitlines()[-1].removesuffix(" files"))
    assert 20 < count <= 30


def test_files_that_texts_name_are_there() -> None:
    """Docs and docstrings point at files by their path from the root, or, in the package, from the package."""
    named = re.compile(
        r"(?<![\w/.…*-])((?:docs|tests|tools|launch|benchmarks|configs|oryx_megatron)/[\w./-]+\.(?:py|md|sh|yaml))\b"
    )
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    elsewhere = {"tests/test_modeling_common.py", "configs/cluster/mine.yaml"}  # transformers'; an example
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in named.findall(path.read_text(encoding="utf-8"))
        if name not in elsewhere and not any((base / name).is_file() for base in (ROOT, PACKAGE))
    }
    assert missing == set()


def test_files_that_comments_name_are_there() -> None:
    """`train/muon.py` in a comment or docstring of the package is a file of this project."""
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    others = {"datasets/indexed_dataset.py", "torch/cuda/__init__.py"}  # megatron-core's, torch's
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in re.findall(r"(?<![\w/.{}-])(?:\w+/)+\w+\.py\b", path.read_text(encoding="utf-8")):
            named[name] = path.name
    assert len(named) > 20
    missing = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
    assert missing <= others, {name: named[name] for name in missing - others}
