"""mkdocs hook: pages of the repository's root as pages of the site; links to other files of it become their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Page of the site: file of the root."""
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)((?:#[^)\s]*)?)\)")
"""Text, target and anchor."""
MARK = re.compile(r"^( *)<!-- (ran|not run): (.+) -->$", re.MULTILINE)
"""How the commands below it ran (tests/doc_commands.py): a comment in the source, a line of the page here."""
ROW, CODE = re.compile(r"^\|.*$", re.MULTILINE), re.compile(r"`[^`\n]+`")
"""Of a table. Code in it writes | as \\|, as GitHub asks; Python-Markdown would show the backslash."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_shown(LINK.sub(_from_root, text))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of docs/ that leave it: to a page made of that file, or to its name in the repository."""
    if page.file.src_uri in PAGES:
        return markdown
    return _shown(LINK.sub(lambda link: _out_of_docs(link, Path(page.file.src_uri).parent), markdown))


def _shown(markdown: str) -> str:
    marked = MARK.sub(lambda mark: f"{mark[1]}<small>{mark[2].capitalize()}: {mark[3]}</small>", markdown)
    return ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), marked)


def _from_root(link: re.Match[str]) -> str:
    target = link[2]
    if target.startswith("docs/"):
        return f"[{link[1]}]({target.removeprefix('docs/')}{link[3]})"
    return _to_source(link, ROOT / target) if "://" not in target else link[0]


def _out_of_docs(link: re.Match[str], folder: Path) -> str:
    target = (ROOT / "docs" / folder / link[2]).resolve()
    if "://" in link[2] or (target.is_relative_to(ROOT / "docs") and target.suffix != ".py"):
        return link[0]
    return _to_source(link, target)


def _to_source(link: re.Match[str], target: Path) -> str:
    """The page made of a file of the root; FileNotFoundError for a file that is not there, which ends the build."""
    name = target.resolve(strict=True).relative_to(ROOT).as_posix()
    page = next((page for page, source in PAGES.items() if source == name), None)
    return f"[{link[1]}]({page}{link[3]})" if page else f"{link[1]} (`{name}`)"
