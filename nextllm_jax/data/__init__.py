"""From a corpus to batches on devices: corpora, shards, preparing, packing, loading."""
