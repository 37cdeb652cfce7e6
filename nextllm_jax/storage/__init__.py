"""Where a run directory is stored: a small interface, and its implementation on disk."""
