"""Labels, shards, sample order and loaders: from files on disk to typed batches."""
