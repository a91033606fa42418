"""A small backbone for examples and tests: `pretrain` trains it, `probe` measures what it knows of recordings."""
