"""Families of checkpoints with one file per network: GLIDE, ADM and LAION's prior."""
