"""Slow, literal, float64 statements of the mathematics, written from the definitions and from nothing else."""
