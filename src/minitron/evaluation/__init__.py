"""How well a model does: held-out text, benchmarks, continuations, speed."""
