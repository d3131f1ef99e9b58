"""Errors that a user can mend."""


class CheckpointError(RuntimeError):
    """A checkpoint does not fit the model, or the form that the model is in."""
