"""Exports on a Hugging Face hub: one commit with every file, into a repository of its own."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from oryx_megatron.errors import ConversionError
from oryx_megatron.hf.folders import MANIFEST

FAILURES = (HfHubHTTPError, HTTPError, OSError, ValueError)
"""What the hub's client raises."""
EMPTY = {".gitattributes", "README.md"}
"""Files of a repository that was made by hand and holds no model yet."""


def check_push(repo: str, *, overwrite: bool = False) -> None:
    """Whether an export may go there; before the work. Only a repository that holds an export is written to again.

    Raises:
        ConversionError: it holds something else, or an export and not `overwrite`; the hub does not answer or refuses.
    """
    try:
        there = set(HfApi().list_repo_files(repo))
    except RepositoryNotFoundError:
        return
    except FAILURES as error:
        raise _told(repo, error) from None
    if there <= EMPTY:
        return
    if MANIFEST not in there:
        raise ConversionError(f"--push {repo}: this repository holds files that are no export; choose another name")
    if not overwrite:
        raise ConversionError(f"--push {repo}: this repository holds an export; replace it with --overwrite")


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload an export, in one commit; files of an earlier one that it lacks go. Returns the address of the commit.

    Raises:
        ConversionError: the hub does not answer or refuses; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload an Oryx export", delete_patterns="*"
        )
    except FAILURES as error:
        raise _told(repo, error) from None
    return str(done.commit_url)


def _told(repo: str, error: Exception) -> ConversionError:
    """What went wrong, in one line."""
    if isinstance(error, LocalTokenNotFoundError) or getattr(getattr(error, "response", None), "status_code", 0) == 401:
        return ConversionError(f"--push {repo}: the hub does not know you; run `hf auth login`, or set HF_TOKEN")
    if isinstance(error, OfflineModeIsEnabled):
        return ConversionError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it to push")
    if isinstance(error, HFValidationError):
        return ConversionError(f"--push {repo}: {' '.join(str(error).split())}")
    what = "refuses" if isinstance(error, HfHubHTTPError) else "does not answer"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConversionError(f"--push {repo}: the hub {what}: {first}")
