"""Checkpoints: find them, read their config, tensors and defaults."""
