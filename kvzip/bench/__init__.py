"""Benchmarks: paired runs against what a user would otherwise run, in the same process."""
