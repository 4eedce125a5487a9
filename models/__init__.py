"""Flax NNX models, one family a file."""
