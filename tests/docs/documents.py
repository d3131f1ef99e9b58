"""The documents, and the code and commands in them."""

import re
import shlex
from typing import NamedTuple

from tool_runs import ROOT

from mmorepa.__main__ import COMMANDS as TOOLS

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


def printed_configs(text):
    """Configs that a document prints under a name, by that name."""
    found = re.findall(r'`(\w+\.py)`[^`]*?\n```python\n(.*?)```', text, flags=re.DOTALL)
    return {name: code for name, code in found if '_base_' in code}


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
                    found.append(Command(name, variables, _as_tool(words)))
    return found


def _as_tool(words):
    """``python -m mmorepa train …`` as the tool that it runs."""
    if words[:3] != ['python', '-m', 'mmorepa'] or len(words) == 3:
        return words
    return ['python', f'tools/{TOOLS[words[3]]}', *words[4:]]
