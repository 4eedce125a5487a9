"""Tool calls in what a model writes: formats as declarations, and the machine that reads them all.

`elements.py` tells how to declare a format; `registry.py` lists them under vLLM's names.
"""
