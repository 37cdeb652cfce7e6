"""Opening, importing, exporting and quantizing existing models."""
