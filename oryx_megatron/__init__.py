"""Distributed pretraining of Oryx language models: one model, two mixers, any token in either."""

__version__ = "0.2.0"
