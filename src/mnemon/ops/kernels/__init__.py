"""Adapters to kernels of other packages, imported on first use."""
