"""Benchmarks, by lm-evaluation-harness."""
