"""Where a run is stored: a small interface, and its implementations for a directory on disk and in a bucket."""
