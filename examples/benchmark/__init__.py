"""What training and running Soft-MoA costs: `python -m examples.benchmark --help`."""
