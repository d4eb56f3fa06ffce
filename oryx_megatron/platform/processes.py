"""How another process ended, in words."""

from __future__ import annotations

import signal

SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a process, for its exit code."""
CAUSES = {
    "SIGKILL": " (memory used up?)",
    "SIGBUS": " (/dev/shm full, or a file cut short while it is read?)",
}


def how_it_ended(code: int) -> str:
    """What an exit code that is not 0 says, e.g. `was killed by SIGKILL (memory used up?)`."""
    number = -code if code < 0 else code - SIGNALLED
    if number not in {known.value for known in signal.Signals}:
        return f"ended with exit code {code}"
    name = signal.Signals(number).name
    return f"was killed by {name}{CAUSES.get(name, '')}"
