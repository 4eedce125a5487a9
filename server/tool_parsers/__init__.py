"""Tool calls in what a model writes: formats as declarations, and the machine that reads them all.

`elements.py` tells how to declare a format; `registry.py` lists them under vLLM's names.  `abstract.py` and
`reasoning.py` are vLLM's interface to parsers, for plug-ins; `protocol.py` and `requests.py` are the types it speaks.
"""
