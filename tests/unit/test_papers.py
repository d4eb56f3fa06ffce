"""What a public project carries: license, versions that agree, papers that name real files, CI that runs ours."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import oryx_megatron

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAPERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/releasing.md")
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
PATH = re.compile(r"(?:oryx_megatron|tools|tests|docs|configs|benchmarks|launch)/[\w./-]*\w")
"""A file or folder of the repository."""


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_license() -> None:
    assert "Apache License" in text("LICENSE")
    assert "the oryx_megatron authors" in text("LICENSE")
    assert PROJECT["license"] == "Apache-2.0"
    assert set(PROJECT["license-files"]) == {"LICENSE", "NOTICE"}


def test_notice_names_every_paper_that_the_code_follows() -> None:
    number = re.compile(r"(?:arXiv:?\s+|arxiv\.org/abs/)(\d{4}\.\d{4,5})")
    cited = {
        paper for path in (ROOT / "oryx_megatron").rglob("*.py") for paper in number.findall(path.read_text("utf-8"))
    }
    assert len(cited) > 15
    assert cited - set(number.findall(text("NOTICE"))) == set()


def test_versions_agree() -> None:
    version = oryx_megatron.__version__
    cited = yaml.safe_load(text("CITATION.cff"))
    assert cited["version"] == version
    assert cited["license"] == "Apache-2.0"
    released = re.findall(r"^## (\S+) - (\S+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == (version, str(cited["date-released"]))
    assert re.search(r"^## Unreleased$", text("CHANGELOG.md"), re.MULTILINE)


@pytest.mark.parametrize("paper", PAPERS)
def test_papers_name_files_that_exist(paper: str) -> None:
    found = {name for name in PATH.findall(text(paper)) if not re.search(r"[…*]|RUN|VERSION", name)}
    assert found
    assert {name for name in found if not (ROOT / name).exists()} == set()
    for target in re.findall(r"\]\(([^)#:]+)\)", text(paper)):
        assert (ROOT / paper).parent.joinpath(target).exists(), target


def test_hosted_ci_runs_ours_and_builds_the_wheel() -> None:
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert runs["test"] == [".ci/run"]
    assert any("pip wheel" in run for run in runs["wheel"])
    assert runs["docs"] == ["make docs"]


def test_the_site_has_every_page() -> None:
    """Each page of docs/ stands once in the site's contents; requirements of the site are exact."""
    site = yaml.safe_load(text("mkdocs.yml"))
    listed = [page for part in site["nav"] for pages in part.values() for page in [pages] if isinstance(pages, str)]
    listed += [page for part in site["nav"] for pages in part.values() if isinstance(pages, list) for page in pages]
    made = {"index.md", "contributing.md", "changelog.md"}
    assert sorted(listed) == sorted(set(PAGES) | made)
    assert site["strict"] is True
    assert {"not_found", "anchors"} <= set(site["validation"]["links"])
    assert not re.search(r"mkdocs build.* (-q|--quiet)", text("Makefile"))  # it hides the warnings that strict counts
    excluded = {path.name for path in (ROOT / "docs").rglob("*.py")}
    linked = {name for page in PAGES for name in re.findall(r"\]\(([^)#\s:]+)", text(f"docs/{page}"))}
    assert site["exclude_docs"].split() == ["*.py"]
    assert not {Path(name).name for name in linked} & excluded
    lines = [line for line in text("requirements-docs.txt").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    site = ROOT / ".venv/docs"
    if not (site / ".ready").exists():
        pytest.skip("`make docs` has not installed mkdocs here")
    config = yaml.safe_load(text("mkdocs.yml"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Here\n\n[a](nowhere.md), [b](#no-heading)\n", encoding="utf-8")
    kept = {name: value for name, value in config.items() if name not in ("hooks", "nav", "plugins")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    (command,) = re.findall(r"python (-m mkdocs build.*)$", text("Makefile"), re.MULTILINE)
    environment = os.environ | {"PYTHONPATH": str(site), "NO_MKDOCS_2_WARNING": "1"}
    arguments = [sys.executable, *command.split()]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Aborted with 2 warnings in strict mode!" in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_of_docs(page: str) -> None:
    """Every link of a page leads to a file that is there, and to a heading that it has."""
    content = text(f"docs/{page}")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", content):
        if "://" in target:
            continue
        here = ROOT / "docs" / page
        path = here.parent / target if target else here
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"


def test_hooks_are_what_make_test_runs() -> None:
    hooks = [
        hook["entry"] for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]
    ]
    assert hooks == ["make lint", "make types"]
    (test,) = re.findall(r"^test: (.*)$", text("Makefile"), re.MULTILINE)
    assert test.split()[:2] == ["lint", "types"]
