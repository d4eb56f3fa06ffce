"""Commands that the pages show, and the mark above each: the test that runs it, or where and when it ran by hand.

    <!-- ran: tests/integration/test_readme.py -->
    <!-- ran: 27 November 2026, two CPU cores -->
    <!-- not run: needs 8 GPUs -->

A mark stands alone on a line above its block; docs/site.py shows it in the site. A note may follow the date's machine
or the test's path after a comma.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oryx_megatron.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"^ *<!-- (ran|not run): (.+) -->$")
PROGRAMS = (
    "oryx|python[.\\d]*|make|torchrun|pip|docker|podman|srun|sbatch|scancel|git|lm_eval|bash|sh|cp|mv|mkdir|source|eval|"
    "export|curl|wget|hf|huggingface-cli|tensorboard|accelerate|deepspeed|apptainer|conda|uv|wandb|nvidia-smi|for|ssh|"
    "pytest|ruff|mypy|pre-commit|shellcheck|jupyter|mkdocs|squeue|sinfo|scontrol|sacct|salloc|kubectl|ray|nvcc|nsys|ncu|"
    "aws|gcloud|gsutil|s5cmd|rclone|rsync|scp|tar|gzip|gunzip|zstd|unzip|cd|ls|cat|head|tail|less|grep|sed|awk|find|jq|"
    "echo|printf|touch|rm|ln|chmod|sudo|apt|apt-get|module|env|tmux|nohup|ipython|pipx|virtualenv|kill|df|du"
)
COMMAND = re.compile(rf"(?:\$ |[A-Z_]+=\S+ |sudo )*(?:(?:{PROGRAMS})(?= |$)|(?:\./|launch/|\.ci/)\S)|[a-z_]+=[\"(]")
LANGUAGES = dict.fromkeys(("bash", "sh", "zsh", "shell", "console", "terminal"), "bash") | dict.fromkeys(
    ("python", "py", "python3", "pycon", "ipython"), "python"
)
"""Of fences, and what they hold."""
CODE = re.compile(r"(?:from \S+ )?import \S|\w+\.\w+\(")
"""A line of Python."""


@dataclass(frozen=True)
class Block:
    """A block of commands, or of Python, on a page."""

    page: str
    line: int
    text: str
    language: str  # bash or python
    ran: bool
    mark: str  # empty: there is none

    @property
    def commands(self) -> list[str]:
        """One a line, without comments and prompts; lines that end in a backslash are joined with the next."""
        if self.language == "python":
            return []
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        lines = [re.sub(r"(?:^|\s)# .*$", "", line.strip().removeprefix("$ ")).strip() for line in lines]
        if "\n$ " in f"\n{self.text}":  # a session: what it printed follows
            prompts = re.findall(r"^\$ (.*)$", re.sub(r"\\\n\s*", " ", self.text), re.MULTILINE)
            return [prompt.strip() for prompt in prompts]
        return [line for line in lines if COMMAND.match(line)]

    @property
    def output(self) -> list[str]:
        """What the block shows that its commands print, a line each; without lines that say that some are left out."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        others = [line for line in lines if not COMMAND.match(line) and line.strip(" …") and line[0] != "#"]
        return others if self.language == "bash" else []


def blocks(page: str, text: str) -> Iterator[Block]:
    """Blocks of commands and of Python of a page, fenced or indented by four."""
    lines = [*text.split("\n"), ""]
    place = 0
    while place < len(lines):
        start, language = place, ""
        if fence := re.match(r" *```(\w*)", lines[place]):
            place += 1
            while not re.match(r" *```$", lines[place]):
                place += 1
            found = lines[start + 1 : place]
            language = LANGUAGES.get(fence[1].lower(), "")
            if not fence[1] and any(COMMAND.match(line) and line.startswith("$ ") for line in found):
                language = "bash"
        elif re.match(r" {4,}\S", lines[place]):
            while re.match(r" {4,}\S", lines[place]) or (not lines[place] and re.match(r" {4,}\S", lines[place + 1])):
                place += 1
            found = [line.removeprefix(" " * _indent(lines[start])) for line in lines[start:place]]
            if any(COMMAND.match(line) for line in found):
                language = "bash"
            elif any(CODE.match(line) for line in found):
                language = "python"
            place -= 1
        place += 1
        if language:
            above = next((line for line in reversed(lines[:start]) if line.strip()), "")
            mark = MARK.match(above) or ("", "", "")
            yield Block(page, start + 1, "\n".join(found), language, mark[1] == "ran", mark[2])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def all_blocks() -> list[Block]:
    """Those of all pages."""
    return [
        block for page in PAGES for block in blocks(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8"))
    ]


def ours(line: str) -> list[str] | None:
    """Module of ours and its arguments; None for another's command."""
    words = shlex.split(re.sub(r"[…]", "", line).replace("[key=value ]", ""))
    if words[0] == "oryx":
        name = next((name for name in (" ".join(words[1:3]), words[1]) if name in COMMANDS), None)
        if name is None:
            assert words[1].startswith("--"), f"no command {words[1]}"
            return None
        return [COMMANDS[name][0], *words[1 + len(name.split()) :]]
    for place, word in enumerate(words):
        if re.fullmatch(r"(tools|launch)/\w+\.py", word):
            assert (ROOT / word).is_file(), word
            module = "launch/submit.py" if word.startswith("launch/") else f"oryx_megatron.tools.{Path(word).stem}"
            return [module, *words[place + 1 :]]
        if word == "-m" and words[place + 1].startswith("oryx_megatron"):
            return words[place + 1 :]
        if re.match(r"(benchmarks|launch|\.ci)/", word):
            assert (ROOT / word).is_file(), word
            return None
    return None
