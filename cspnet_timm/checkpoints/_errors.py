"""The error that every reader raises."""

__all__ = ['CheckpointError']


class CheckpointError(ValueError):
    """A checkpoint file cannot be read, or holds another network than the one asked for; the message says which."""
