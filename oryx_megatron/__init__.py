"""Distributed pretraining of Oryx language models: one model, two mixers, any token in either."""

import sys

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"] and "oryx_megatron.doctor" not in sys.orig_argv:  # python -m oryx_megatron.…
    from oryx_megatron import environment

    environment.check()
