"""What one forward pass carries, and how it gets there."""
