"""Corpora, tokenizers, indexed datasets and the loader. Only `loader` imports torch."""
