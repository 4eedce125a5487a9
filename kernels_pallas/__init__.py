"""Attention over paged KV caches: one public function per operation, so far plain XLA on every platform."""
