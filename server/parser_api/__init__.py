"""vLLM's interface to parsers, under names of our own: what plug-ins derive from, register with and are given.

Which of vLLM's names stands for what is told by `plugins/vllm_names.py`.
"""
