"""Attention over paged KV caches: one public function per operation, chosen by platform."""
