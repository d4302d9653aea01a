"""Checks of `trd_kernels` on a device; `run_kernels.py` runs them all and needs torch, triton and numpy alone."""
