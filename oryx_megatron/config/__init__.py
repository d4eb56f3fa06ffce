"""Typed run and model configs: schema, loading, overrides, validation. No torch."""
