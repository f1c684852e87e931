"""What a run measures and records in addition to its metrics: held-out examples, trackers, provenance."""
