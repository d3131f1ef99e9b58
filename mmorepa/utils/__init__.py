"""Helpers for all other parts of the package."""
