"""What is saved and loaded: checks of what comes from elsewhere, and the model card."""
