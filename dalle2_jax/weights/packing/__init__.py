"""Packing of trained systems: a small copy with averaged weights only, and its model card."""
