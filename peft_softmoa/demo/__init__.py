"""A training on synthesised sounds, of a small transformer that comes with the package."""
