"""Models that exist already, from this and other programs."""
