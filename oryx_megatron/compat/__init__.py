"""What this project changes in other packages, so that they work here: one file per upstream.

`torch.py`, `megatron.py`, `deepspeed.py`, `transformer_engine.py`, `fla.py` and `tilelang.py` hold every patch with the
versions that it is for and its reason; tests/unit/test_compat*.py fail when an upstream no longer needs one. Nothing
here knows of the product.

Importing this package loads none of them; it installs the hook (hook.py) that defers imports of theirs no run uses.
"""

from oryx_megatron.compat import deepspeed, fla, hook, megatron, tilelang, torch, transformer_engine
from oryx_megatron.compat.hook import late

hook.install(
    {**torch.AROUND, **megatron.AROUND, **deepspeed.AROUND, **transformer_engine.AROUND, **fla.AROUND}, fla.WHEN_USED
)
megatron.quiet()

__all__ = ["deepspeed", "fla", "late", "megatron", "tilelang", "torch", "transformer_engine"]
