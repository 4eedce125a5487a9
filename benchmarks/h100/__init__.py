"""What one H100 does with Llama-3.1-8B and Llama-3.2-1B dimensions, beside vLLM's figures and the floor."""
