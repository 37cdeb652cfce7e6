"""What a config costs on accelerators that are not here: compiled ahead of time, or estimated."""
