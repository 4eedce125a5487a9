"""Measurements that take longer than a test, each a script of its own."""
