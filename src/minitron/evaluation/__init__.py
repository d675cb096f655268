"""Measuring a model: held-out text, benchmarks, continuations, speed."""
