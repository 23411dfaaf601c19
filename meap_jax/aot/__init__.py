"""Ahead-of-time compilation for hardware that this machine lacks, with estimates of memory and time."""
