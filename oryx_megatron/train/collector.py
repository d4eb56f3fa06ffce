"""Python's collector of cycles: off while a run imports and builds, and afterwards blind to what that left.

Imports alone leave 250,000 objects that stay. To look through them again and again takes a tenth of the imports' time.
In training it would take 0.1 to 0.3 s (two CPU cores) now and then, on each rank at another step, and in a collective
all ranks wait for each. Objects that are frozen are not looked through.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_off = _frozen = False
"""What was done here, and not by the caller of a command: that stays as it is."""


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Off inside, until `settle`; as before at the end."""
    global _off
    _off = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        thaw()
        if _off:
            gc.enable()
        _off = False


def settle() -> None:
    """Freeze what there is and turn the collector on, where it was put off; else nothing."""
    global _off, _frozen
    if _off:
        gc.collect()
        if not gc.get_freeze_count():  # else there would be no way back to what the caller froze
            gc.freeze()
            _frozen = True
        gc.enable()
        _off = False


def thaw() -> None:
    """Let the collector look at everything again: what was built is no longer in use."""
    global _frozen
    if _frozen:
        gc.unfreeze()
        _frozen = False
