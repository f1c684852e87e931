"""Import of published image networks whose features measures compare, and the folders that they are stored in."""
