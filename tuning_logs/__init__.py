"""Tuned records that ship with the package: one folder a target fingerprint, each in the tuning store's format."""
