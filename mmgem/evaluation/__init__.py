"""Evaluation: figures (metrics), protocols (tasks), the report, and `evaluate` that runs them."""
