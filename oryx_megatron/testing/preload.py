"""What ranks of tests have imported when they are forked (distributed.py). Only for machines without a GPU."""

import gc

from oryx_megatron import platform

platform.install()

import oryx_megatron.train.trainer  # noqa: E402, F401

gc.collect()
gc.freeze()  # a collection in a rank, as after every layout of layouts.py, need not look at all this
