"""What README and docs name is there: files, links, names of the package.

That their examples run is in test_examples.py, that their commands do is in
test_commands.py.
"""

import ast
import importlib
import re

import pytest
from documents import DOCUMENTS, NAMES, code_blocks
from tool_runs import ROOT

TOP_FOLDERS = '|'.join(['tools', 'configs', 'docs', 'tests', 'mmorepa', 'requirements'])


def each_document(function):
    return pytest.mark.parametrize('path', DOCUMENTS, ids=NAMES)(function)


def paths_named(text):
    """Paths within the repository; those with a gap for the reader are left out."""
    found = re.findall(rf'(?<![\w/.:-])(?:{TOP_FOLDERS})/[\w./*{{}}…-]*', text)
    found = {path.rstrip('.') for path in found}
    return sorted(path for path in found if '…' not in path and '{' not in path)


@each_document
def test_paths_exist(path):
    missing = [
        name
        for name in paths_named(path.read_text())
        if not (list(ROOT.glob(name)) if '*' in name else (ROOT / name).exists())
    ]
    assert not missing


@each_document
def test_links_lead_somewhere(path):
    text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
    targets = re.findall(r'\]\(([^)\s]+)\)', text)
    files = {target.split('#')[0] for target in targets if '://' not in target}
    missing = [name for name in files - {''} if not (path.parent / name).exists()]
    assert not missing


@each_document
def test_names_of_the_package_exist(path):
    """``mmorepa.a.b`` in the text, and what its code imports from the package."""
    text = path.read_text()
    names = set(re.findall(r'\bmmorepa(?:\.[A-Za-z_]\w*)+', text))
    names = {name for name in names if not name.endswith(('.git', '.py'))}
    for code in code_blocks(text, 'python'):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('mmorepa'):
                names |= {f'{node.module}.{alias.name}' for alias in node.names}
    for name in sorted(names):
        found, *rest = name.split('.')
        value = importlib.import_module(found)
        for part in rest:
            try:
                value = getattr(value, part)
            except AttributeError:
                value = importlib.import_module(f'{value.__name__}.{part}')
