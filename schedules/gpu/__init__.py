"""Kernels for GPUs: work-groups and work-items instead of threads and vectors."""
