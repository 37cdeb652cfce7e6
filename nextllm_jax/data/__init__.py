"""The data pipeline from a corpus to batches on devices: corpora, preparation, shards, packing, loading."""
