"""The rows of bench.py: what is measured, beside what."""
