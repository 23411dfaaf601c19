"""Figures of docs/performance.md, a module each: every one a ratio of two things timed in turns in one run."""
