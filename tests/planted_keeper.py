"""Decides while it is imported where it keeps what later calls find again, as PyTorch's compiler does."""
import tempfile

FOLDER = tempfile.gettempdir()
