"""Ways of fine-tuning one transformer, by cross-validation: see `python -m examples.method_comparison --help`."""
