"""What MkDocs does not know of this project's docstrings: the roles of Sphinx, which Python's own tools show too."""
import re
from typing import Any

ROLE = re.compile(r':(?:class|func|meth|mod|attr|data|exc):<code>~?((?:\w+\.)*)(\w+)</code>')


def on_page_content(html: str, **_: Any) -> str:
    """Show ``:func:`save``` as the code that it names."""
    return ROLE.sub(lambda match: f'<code>{match[2]}</code>', html)
