"""Files of weights, from the places that have them."""
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

__all__ = ['Source']

_HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{7,8})(?:_\d{8})?\.\w+$')  # not a date


@dataclass(frozen=True)
class Source:
    """One place that a file of weights is to be had from: an address, or a repository on the Hugging Face Hub.

    Attributes:
        url: The address.
        repo_id: The repository, ``'user/name'`` or ``'user/name@revision'``, in place of an address.
        filename: The file's name, by default the last part of the address.
        sha256: SHA-256 of the file, or its first digits; by default the eight that OpenMMLab writes into a name.
        size: Bytes of the file; 0 where nobody says.
        manual: The file is not downloaded, because its licence or its host does not allow it.
    """

    url: str = ''
    repo_id: str = ''
    filename: str = ''
    sha256: str = ''
    size: int = 0
    manual: bool = False

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.repo_id):
            raise ValueError(f'a source has either an address or a repository, not {self.url!r} and {self.repo_id!r}.')
        if not self.filename:
            object.__setattr__(self, 'filename', unquote(urlsplit(self.url).path.rpartition('/')[2]))
        if not self.sha256 and (match := _HASH_IN_NAME.search(self.filename)):
            object.__setattr__(self, 'sha256', match[1])

    @property
    def link(self) -> str:
        """Address for a browser."""
        if self.url:
            return self.url
        repo_id, _, revision = self.repo_id.partition('@')
        return f'https://huggingface.co/{repo_id}/resolve/{revision or "main"}/{self.filename}'
