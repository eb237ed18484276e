"""Triton kernels and their launchers; imported lazily by the ops, never by `mm_core.kernels` itself.

Launchers run on the current device and stream, and read nothing back from the device, so that every one
of them can be captured in a CUDA graph. With `TRITON_INTERPRET=1` they also take CPU tensors.
"""
