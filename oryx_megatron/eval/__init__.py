"""Evaluation: generation, perplexity per plan, retrieval tasks, training of the router."""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses
