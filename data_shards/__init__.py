"""From public data to the batches of one rank: documents, tar shards, order, sequences, loader."""
