"""What README and docs name is there: files, flags, links, names of the package.

That their examples run is in test_examples.py, that their commands do is in
test_commands.py.
"""

import ast
import importlib
import re

import pytest
from documents import DOCUMENTS, NAMES, ROOT, code_blocks
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS

import mmorepa  # noqa: F401  (registers)

TOP_FOLDERS = '|'.join(['tools', 'configs', 'docs', 'tests', 'mmorepa', 'requirements'])
# Shared flags are defined here.
COMMON = (
    'mmorepa/cli/parser.py',
    'tools/analysis_tools/charts.py',
    'tools/benchmarks/studies.py',
)


def each_document(function):
    return pytest.mark.parametrize('path', DOCUMENTS, ids=NAMES)(function)


def paths_named(text):
    """Paths within the repository; those with a gap for the reader are left out."""
    found = re.findall(rf'(?<![\w/.:-])(?:{TOP_FOLDERS})/[\w./*{{}}…-]*', text)
    found = {path.rstrip('.') for path in found}
    return sorted(path for path in found if '…' not in path and '{' not in path)


def command_lines(text):
    """Commands in shell blocks, in inline code and in rows of tables."""
    lines = '\n'.join(code_blocks(text, 'bash')).replace('\\\n', ' ').splitlines()
    lines += re.findall(r'`([^`\n]*tools/[^`\n]*)`', text)
    lines += [line for line in text.splitlines() if line.startswith('|')]
    return [line.split('#')[0].strip() for line in lines if 'tools/' in line]


def test_there_are_documents():
    assert ROOT / 'docs' / 'new_block.md' in DOCUMENTS
    assert ROOT / 'docs' / 'model_zoo.md' in DOCUMENTS


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
def test_flags_of_commands_exist(path):
    """Every ``--flag`` is a word of the tool that it is given to."""
    unknown = []
    for line in command_lines(path.read_text()):
        tools = re.findall(r'tools/[\w./-]+\.(?:py|sh)', line)
        sources = [ROOT / name for name in (*tools, *COMMON)]
        # Shell scripts hand their flags on.
        if any(name.endswith('.sh') for name in tools):
            sources += ROOT.glob('tools/*.py')
        known = '\n'.join(p.read_text() for p in sources if p.is_file())
        after = line[line.index(tools[0]) :] if tools else line
        flags = re.findall(r'(?<![\w-])--[a-z][\w-]*', after)
        unknown += [
            f'{line}: {flag}'
            for flag in flags
            if not re.search(rf'{flag}(?![\w-])', known)
        ]
    assert not unknown


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


def registered_types(text):
    """The types of configs in the document's code that begin with our prefixes."""
    code = '\n'.join(code_blocks(text, 'python'))
    types = set(re.findall(r"type='([A-Z]\w+)'", code))
    return {name for name in types if 'OREPA' in name or name.endswith('DeployHook')}


@each_document
def test_types_are_registered(path):
    registries = (MODELS, HOOKS, OPTIM_WRAPPERS)
    for name in registered_types(path.read_text()):
        assert any(name in registry.module_dict for registry in registries), name
