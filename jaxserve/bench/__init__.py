"""Measuring: load generator, latency and throughput runs, and the reports they make."""
