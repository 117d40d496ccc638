"""Predictions to figures: the metrics of benchmarks, each with its interval; needs no model."""
