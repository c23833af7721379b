"""Whole blocks as one kernel (on GPUs, a few launches), composed of primitives."""
