"""Benchmarks of the operators and of whole steps: `pytest benchmarks/ --benchmark-json=FILE`."""
