"""The documents, and the code and commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PLACES = ('*.md', 'docs/**/*.md', 'configs/**/*.md')
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


class Command(NamedTuple):
    """A line of a shell block."""

    document: str
    variables: dict[str, str]
    words: list[str]


def code_blocks(text, language):
    return re.findall(rf'```{language}\n(.*?)```', text, flags=re.DOTALL)


def commands():
    """All commands of all documents, in order."""
    found = []
    for name, path in zip(NAMES, DOCUMENTS):
        for block in code_blocks(path.read_text(), 'bash'):
            for line in re.split(r'\n|&&', block.replace('\\\n', ' ')):
                words = shlex.split(line, comments=True)
                variables = {}
                while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
                    variables.update([words.pop(0).split('=', 1)])
                if words:
                    found.append(Command(name, variables, words))
    return found
