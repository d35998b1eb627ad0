"""Damaged input for every parser: `python -m tests.fuzz`, or `make fuzz`."""
