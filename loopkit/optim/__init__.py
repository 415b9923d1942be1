"""Optimizers by name, their param groups, and schedules."""
