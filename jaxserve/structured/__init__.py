"""Structured output: constraints become grammars, and grammars say which tokens may come next.

Knows tokenizers and llguidance, and neither jax nor HTTP.
"""
