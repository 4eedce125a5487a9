"""Parser plug-ins written for vLLM: loaded unchanged, driven as vLLM drives them."""
