"""Training: brings data, model and losses together."""
