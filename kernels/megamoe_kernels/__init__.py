"""Kernels that are found at run time and never required; each stands beside its reference."""
