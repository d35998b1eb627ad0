"""Benchmarks against the peers: `make bench` runs them and writes docs/benchmarks.md.

Contestants run in turn in one run, on the same inputs, files in the page cache; what counts is the
ratio. A peer that cannot be installed is said to be missing, and fails nothing.
"""
