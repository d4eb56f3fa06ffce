"""Whether this Python is one that the package is installed in. Runs where nothing is: the standard library alone.

Commands begin with it, so that one started outside the environment says so, and does not end in an ImportError.
"""

import importlib.util
import os
import sys

NEEDED = ("torch", "megatron.core", "numpy", "yaml", "sentencepiece", "tokenizers", "safetensors", "psutil", "tqdm")
"""Modules of pyproject.toml's dependencies that every command may import; transformers has its own message."""
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def missing() -> list[str]:
    """Needed modules that this Python has not, looked up without importing them."""
    return [name for name in NEEDED if not found(name)]


def found(name: str) -> bool:
    """Whether this Python has a module, looked up without importing it."""
    parent, _, own = name.rpartition(".")
    spec = importlib.util.find_spec(parent or own)
    if parent:  # `megatron` is a mere folder: what is in it is found without importing it
        folders = spec.submodule_search_locations if spec is not None else None
        return any(os.path.isfile(os.path.join(folder, own, "__init__.py")) for folder in folders or ())
    return spec is not None and spec.origin is not None  # a folder of that name, as tokenizers/ here, is no package


def problem() -> str:
    """Why nothing can run in this Python and what to do, in one line; empty when it can."""
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python somebody has
        version = ".".join(map(str, sys.version_info[:2]))
        return f"Python {version} ({sys.executable}) is too old: oryx_megatron needs 3.11 or later; {_advice()}"
    if absent := missing():
        names = ", ".join(absent)
        return f"this Python ({sys.executable}) is not the environment of oryx_megatron: it lacks {names}; {_advice()}"
    return ""


def check() -> None:
    """End the process with one line and code 2 unless everything needed is there."""
    if text := problem():
        sys.stderr.write(f"error: {text}\n")
        sys.exit(2)


def _advice() -> str:
    if not os.path.isfile(os.path.join(CHECKOUT, "pyproject.toml")):
        return "run `pip install oryx-megatron` with this Python, or activate the environment that has it"
    activate = os.path.join(CHECKOUT, ".venv", "bin", "activate")
    activate = activate if len(activate) < len(os.path.relpath(activate)) else os.path.relpath(activate)
    if os.path.isfile(activate):
        return f"run `source {activate}` first"
    return f"run `make install` in {CHECKOUT}`, then `source {activate}`"
