"""The data: records in, batches out. Knows nothing of models."""
