"""Trained adapters at work."""
