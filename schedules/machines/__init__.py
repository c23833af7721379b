"""Machines as data: vector units and cores of CPUs, limits and families of GPUs."""
