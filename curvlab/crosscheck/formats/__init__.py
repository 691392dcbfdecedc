"""One file a format: bytes on disk to tensors and numbers by key, executing nothing."""
