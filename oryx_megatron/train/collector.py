"""Python's collector of cycles: off while a run imports and builds, and afterwards blind to what that left.

Imports, the model and the optimizer leave 400,000 objects that stay. To look through them takes a tenth of the imports'
time. In training it takes a third of a second now and then, on each rank at another step, and in a collective all ranks
wait for each. Objects that are frozen are not looked through.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Off inside, until `settle`; on at the end, and nothing frozen."""
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def settle() -> None:
    """Freeze what there is and turn the collector on, where it was put off; else nothing."""
    if not gc.isenabled():
        gc.collect()
        gc.freeze()
        gc.enable()
