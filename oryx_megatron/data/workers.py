"""What goes wrong in the loader processes of `data.num_workers`, as one line."""

from __future__ import annotations

import re
from typing import Any

from oryx_megatron.errors import DataError
from oryx_megatron.platform.processes import how_it_ended

PATIENCE = 2.0
"""Seconds until the end of a process is known, whose broken pipe may be seen before."""


def in_one_line(error: Exception, processes: list[Any]) -> Exception:
    """What to raise for an error met while reading batches.

    Args:
        error: torch's, which tells of a process that died by whatever broke first, and of an error in one by a text
            with its traceback.
        processes: The loader processes.

    Returns:
        A DataError of one line where the message would have more, or say nothing; else `error` itself.
    """
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker process" in text:
        kind = text.split()[1]
        line = re.sub(rf"^(\w+\.)*{re.escape(kind)}: ", "", text.strip().splitlines()[-1])
        return DataError(line if kind == "DataError" else f"a loader process failed ({kind}: {line})")
    if isinstance(error, DataError):
        return error
    for process in processes:
        process.join(PATIENCE / len(processes))
        if process.exitcode:
            return DataError(
                f"a loader process {how_it_ended(process.exitcode)}; rerun to resume, with fewer data.num_workers if "
                "memory is short"
            )
    return error
