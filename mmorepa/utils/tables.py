"""Plain-text tables."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def counted(number: int, noun: str) -> str:
    """A number and what it counts: '1 thread', '2 threads'."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table, the first column flush left and the others right."""
    table = Table(box=None, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify='right' if i else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    # The width fits any row, since a log must not be cut.
    Console(file=text, width=400, color_system=None, emoji=False).print(
        table, markup=False
    )
    return '\n'.join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
