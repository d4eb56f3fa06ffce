"""What pyproject.toml cannot say: folders of the repository that a wheel holds inside the package (resources.py)."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "tokenizers", "launch", "tools")
ONLY_HERE = {"tools/quickstart.py"}
"""Walks through the repository itself."""


class BuildPy(build_py):
    """Adds the folders to oryx_megatron/; an editable install finds them where they are."""

    def run(self) -> None:
        """See base class."""
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                shutil.copymode(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """See base class."""
        own = [] if self.editable_mode else [target for _, target in self._shipped()]
        return [*super().get_outputs(include_bytecode), *own]

    def _shipped(self) -> list[tuple[str, str]]:
        files = (path for folder in FOLDERS for path in sorted(Path(folder).rglob("*")) if path.is_file())
        names = (path.as_posix() for path in files if "__pycache__" not in path.parts)
        return [(name, f"{self.build_lib}/oryx_megatron/{name}") for name in names if name not in ONLY_HERE]


setup(cmdclass={"build_py": BuildPy})
