"""The error that every reader raises."""

__all__ = ['CheckpointError']


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint file cannot be read, or holds another network than the one asked for; the message says which.

    Also a ``RuntimeError``, which is what ``load_state_dict`` of any module raises.
    """
