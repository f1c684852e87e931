"""Image networks whose features measures compare. Modules have the names that the published files have."""
