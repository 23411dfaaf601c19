"""Sweeps on rented accelerators, run by existing engines."""
