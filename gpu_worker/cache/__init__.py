"""The KV cache as one worker sees it."""
