"""Plans of training and sampling: memory, time and cost on accelerators that this machine does not have."""
