"""Kernels for each family of machines."""
