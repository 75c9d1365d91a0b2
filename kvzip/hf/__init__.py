"""Everything that knows transformers: the attention seam, the caches behind it, model geometry, chat templates."""
