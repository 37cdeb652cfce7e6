"""Where the files of a run are: a directory behind a small interface."""
