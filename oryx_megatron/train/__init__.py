"""Training: step, loop, optimizer and schedule, callbacks, evaluation. `python -m oryx_megatron.train RUN.yaml`."""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it puts off what that loads in vain
