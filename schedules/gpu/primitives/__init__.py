"""Kernels that can be used by themselves, and the loop builders that fused blocks are composed of."""
