"""Optimizer wrappers and their constructor."""
