"""The package's imports point one way: every part imports only from the parts before it (docs/architecture.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "oryx_megatron"
ORDER = (
    "environment",
    "errors",
    "resources",
    "atomic",
    "reading",
    "display",
    "paths",
    "storage",
    "cli",
    "ranks",
    "PURE",
    "config",
    "arch",
    "pipeline_schedule",
    "planner_costs",
    "planner",
    "modes",
    "compat",
    "platform",
    "SHARED",
    "ops",
    "parallel",
    "data",
    "model",
    "checkpoint",
    "hf",
    "train",
    "eval",
    "health",
    "testing",
    "MAINS",
)
"""Parts from first to last. MAINS: other modules right under the package, and every __main__."""
PURE = {"hf.plans_oryx"}
"""Modules of pure Python that configs are read by and every export ships."""
SHARED = {"hf.norm_conv_oryx", "hf.recurrences_oryx", "hf.rotary_oryx", "hf.states_oryx"}
"""Modules of nothing but torch that training computes with and every export ships."""
MAY_START = {"environment", "api"}
"""What the package's __init__ imports: the one at `python -m`, the other for type checkers alone."""
MAY_GUARD = {"ops", "platform", "cli"}
STANDALONE = {f"hf.{path.stem}" for path in (PACKAGE / "hf").glob("*_oryx.py")}
"""Copied into every export, where this package is absent: they may guard kernels, and import only each other."""
KERNELS = {"fla", "mamba_ssm", "causal_conv1d", "flash_attn"}
NO_TORCH = {*ORDER[: ORDER.index("modes") + 1]}
IMPORT_ERRORS = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


def part(module: str) -> str:
    """Part of a module named without the package, e.g. config of config.loading."""
    first, *_ = names = module.split(".")
    if module in PURE | SHARED:
        return "PURE" if module in PURE else "SHARED"
    return "MAINS" if names[-1] == "__main__" or first not in ORDER else first


def modules(package: Path) -> dict[str, Path]:
    """Modules of the package by name without the package's own; the package's __init__ is ''."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        names = list(path.relative_to(package).with_suffix("").parts)
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imports(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports, inside functions too."""
    here = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def names_in(node: ast.AST | None) -> set[str]:
    return {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(node)} if node else {"BaseException"}


def guards(tree: ast.AST) -> Iterator[int]:
    """Lines where a failing import is caught."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            caught = set().union(*(names_in(handler.type) for handler in node.handlers)) & IMPORT_ERRORS
        elif isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if "suppress" in names_in(item.context_expr)]
            caught = set().union(*map(names_in, calls)) & IMPORT_ERRORS
        else:
            continue
        inside = [inner for child in node.body for inner in ast.walk(child)]
        if caught and any(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in inside):
            yield node.lineno


def faults(package: Path) -> list[str]:
    """Every broken rule of a package as `file:line: what`, and every cycle of modules."""
    known = modules(package)
    found: list[str] = []
    edges: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = part(name) if name else ""
        place = str(path.relative_to(package.parent))
        if own not in MAY_GUARD and name not in STANDALONE:
            found += [f"{place}:{line}: guarded import" for line in guards(tree)]
        for line, target in imports(tree, path, package):
            top, _, inner = target.partition(".")
            if top in KERNELS and own != "ops" and name not in STANDALONE:
                found.append(f"{place}:{line}: {top} is imported outside ops")
            if top in ("torch", "megatron") and own in NO_TORCH:
                found.append(f"{place}:{line}: {own} imports {top}")
            if own == "SHARED" and top not in ("torch", package.name) and top not in sys.stdlib_module_names:
                found.append(f"{place}:{line}: {name} imports {top}, not torch alone")
            if top != package.name:
                continue
            while inner not in known:  # from the package's module M import something: the module is M
                inner = inner.rpartition(".")[0]
            if not inner:
                continue  # the package's own __init__: the version
            edges[name].add(inner)
            if name in STANDALONE and inner not in STANDALONE:
                found.append(f"{place}:{line}: {name} travels alone and imports {inner}")
            to = part(inner)
            if not own and inner not in MAY_START:
                found.append(f"{place}:{line}: the package's __init__ imports {to}")
            elif not own:
                continue
            elif to == "testing" and own != "testing":
                found.append(f"{place}:{line}: {own} imports testing")
            elif to == "MAINS":
                found.append(f"{place}:{line}: {own} imports the main {inner}")
            elif ORDER.index(to) > ORDER.index(own):
                found.append(f"{place}:{line}: {own} imports {to}, which comes after it")
    return found + [f"cycle: {' → '.join(cycle)}" for cycle in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One cycle for every module that closes one, by depth-first search."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges[name] - {name}):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def test_imports_point_one_way():
    assert faults(PACKAGE) == []


def test_first_parts_load_without_torch():
    code = (
        "import sys; import oryx_megatron.arch, oryx_megatron.modes, oryx_megatron.config, oryx_megatron.cli; "
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("config/a.py", "from oryx_megatron.train import loop", "config imports train, which comes after it"),
        ("config/a.py", "from oryx_megatron import train", "config imports train, which comes after it"),
        ("config/a.py", "def f():\n    import oryx_megatron.train.loop", "a.py:2: config imports train"),
        ("config/a.py", "from ..train import loop", "config imports train"),
        ("config/a.py", "from ..train.loop import step", "config imports train"),
        ("config/a.py", "import importlib\nimportlib.import_module('oryx_megatron.train')", "config imports train"),
        (
            "config/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
            "a.py:3: config imports torch",
        ),
        ("train/a.py", "from oryx_megatron.testing import help", "train imports testing"),
        ("doctor.py", "from oryx_megatron.testing import help", "MAINS imports testing"),
        ("train/a.py", "from oryx_megatron.main import x", "train imports the main main"),
        ("train/a.py", "from oryx_megatron.train import __main__", "train imports the main train.__main__"),
        ("train/a.py", "try:\n    import wandb\nexcept ImportError:\n    wandb = None", "a.py:1: guarded import"),
        ("train/a.py", "try:\n    import wandb\nexcept (KeyError, ModuleNotFoundError):\n    pass", "guarded import"),
        ("train/a.py", "try:\n    from w import b\nexcept:\n    pass", "guarded import"),
        ("train/a.py", "import contextlib as c\nwith c.suppress(ImportError):\n    import b", "a.py:2: guarded import"),
        ("train/a.py", "def f():\n    from fla.ops import x", "a.py:2: fla is imported outside ops"),
        (
            "hf/modeling_oryx.py",
            "from oryx_megatron.modes import Mode",
            "hf.modeling_oryx travels alone and imports modes",
        ),
        ("hf/plans_oryx.py", "import torch", "PURE imports torch"),
        ("hf/states_oryx.py", "from transformers import Cache", "hf.states_oryx imports transformers, not torch alone"),
        ("platform/a.py", "import flash_attn.cute", "flash_attn is imported outside ops"),
        ("__init__.py", "from oryx_megatron.train import loop", "__init__ imports train"),
        ("train/a.py", "from oryx_megatron.train import loop", "cycle: train.loop → train.a → train.loop"),
    ],
)
def test_the_test_sees_faults(tmp_path, path, text, message):
    package = tmp_path / "oryx_megatron"
    files = {
        "__init__.py": "__version__ = '1'",
        "main.py": "from oryx_megatron.train import loop\nfrom oryx_megatron import __version__",
        "config/__init__.py": "",
        "train/__init__.py": "",
        "train/__main__.py": "from oryx_megatron.train.loop import step\nfrom oryx_megatron.eval import x",
        "train/loop.py": "from oryx_megatron.config import x",
        "eval/__init__.py": "",
        "hf/__init__.py": "",
        "hf/configuration_oryx.py": "",
        "hf/modeling_oryx.py": "import torch\ntry:\n    import fla\nexcept ImportError:\n    pass",
        "modes.py": "",
        "testing/__init__.py": "",
        "ops/__init__.py": "try:\n    import fla\nexcept ImportError:\n    fla = None",
    }
    for name, content in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    assert faults(package) == []
    if message.startswith("cycle"):
        (package / "train/loop.py").write_text("def step():\n    from oryx_megatron.train import a")
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    (package / path).write_text(text)
    found = faults(package)
    assert any(message in fault for fault in found), found
