"""Corpora, tokenizers, indexed datasets and the loader. Only `loader` imports torch."""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses
