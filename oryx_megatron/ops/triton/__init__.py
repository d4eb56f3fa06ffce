"""Kernels in Triton for what lies between the mixer's matrix products and its attention and recurrence kernels.

Import only where Triton is installed. None of them autotunes, none has an argument that a mode plan could specialise:
each is compiled once per model and format.
"""
