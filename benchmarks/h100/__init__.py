"""What one H100 does with the dimensions of Llama, Mixtral and Qwen3-MoE, beside vLLM's figures and the floor."""
