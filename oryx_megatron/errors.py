"""The errors a user can cause or fix. Each is shown as one line and ends the process with exit code 2."""

import errno
from typing import Self

USER_ERROR = 2
"""Exit code of every command after one of these."""
REQUEUE_EXIT_CODE = 75
"""Exit code (EX_TEMPFAIL) of a run stopped by a signal or by its time limit, with everything saved: start it again."""
HANG_EXIT_CODE = 70
"""Exit code (EX_SOFTWARE) of a rank that made no progress for faults.hang_timeout: torchrun starts all ranks again."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a full disk, a used-up quota, a file beyond a limit; writing a file gives them no name."""


class OryxError(Exception):
    """Base of all errors whose message alone tells a user what is at fault and what to do."""

    rank_local = False
    """True when only one rank of a distributed run can see the fault; otherwise all ranks raise it together."""

    @classmethod
    def of_one_rank(cls, text: str) -> Self:
        """An error that only this rank sees, e.g. of its environment or of a peer that is gone."""
        error = cls(text)
        error.rank_local = True
        return error


class ConfigError(OryxError):
    """A field of a config, or a combination of fields, is wrong."""


class DataError(OryxError):
    """A corpus, a tokenizer or an indexed dataset is missing, damaged or does not fit."""


class CheckpointError(OryxError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class ClosedCheckpointError(CheckpointError):
    """A checkpoint that this process cannot read, and of which nothing says that it is damaged: not to be skipped."""


class NewerCheckpointError(ClosedCheckpointError):
    """It is of a newer version than this one."""


class ConversionError(OryxError):
    """A model could not be turned into, or read from, another format."""


class TrainingError(OryxError):
    """A run cannot continue with what it computes."""


def first_line(error: BaseException) -> str:
    """First line of a library's message; the error's class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


WEIGHTS_ALONE = "start a new run from the weights alone (init_from, another output_dir)"
"""Advice where a run cannot resume as what it was."""
