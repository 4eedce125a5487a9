"""Answers that follow a JSON schema, measured over HTTP: `python benchmarks/structured.py`."""
