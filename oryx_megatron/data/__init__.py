"""Corpora, tokenizers, indexed datasets and the loader. Making data needs no torch; reading it for a run does."""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses
