"""The ops as Triton kernels: one file an op, kernels above their launchers."""
