"""Answers that follow a JSON schema, measured over HTTP: `python -m benchmarks.structured`."""
