"""What the documentation site makes of the rest of the repository.

The landing page is the README. Every room of the package has a page of its docstrings,
every folder of configs a page with their text, and formulas become MathML. Links stay
those that work in the repository, and are translated here.
"""

import html
import os
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
ROOMS = sorted(
    path.parent
    for path in ROOT.glob('mmorepa/*/__init__.py')
    if '__all__' in path.read_text()
)
CONFIGS = sorted(path for path in ROOT.glob('configs/*') if path.is_dir())
# What people open beside the README, and the README of the landing page.
TEXTS = {path: f'{path.stem.lower()}.md' for path in ROOT.glob('*.md')}
TEXTS[ROOT / 'README.md'] = 'index.md'
# By the plugin 'offline', from a place that is not there offline.
FETCHED = 'https://unpkg.com/iframe-worker/shim'
# The files of a folder of configs that its page shows, with their language.
SHOWN = {'.py': 'python', '.yml': 'yaml'}
# Within the repository: text and target.
LINK = re.compile(r'\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)')
UNSEARCHED = '---\nsearch:\n  exclude: true\n---\n'


def on_config(config: MkDocsConfig) -> None:
    """Completes the navigation."""
    sections = {
        'API': ['api/index.md', *(_room_page(room) for room in ROOMS)],
        'Configs': [_config_page(folder) for folder in CONFIGS],
    }
    for entry in config.nav:
        for name in entry.keys() & sections.keys():
            entry[name] = sections[name]
    others = sorted(uri for uri in TEXTS.values() if uri != 'index.md')
    if others:
        config.nav.append({'Project': others})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are made from the code."""
    pages = {uri: translated(path.read_text(), path) for path, uri in TEXTS.items()}
    pages['api/index.md'] = (
        '# The package\n\n::: mmorepa\n    options:\n      heading_level: 2\n'
    )
    for room in ROOMS:
        pages[_room_page(room)] = f'# mmorepa.{room.name}\n\n::: mmorepa.{room.name}\n'
    for folder in CONFIGS:
        pages[_config_page(folder)] = UNSEARCHED + _text_of_configs(folder)
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for name in ('LICENSE', 'CITATION.cff'):
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, **kwargs) -> str:
    """Translates the links of what is written in docs/."""
    path = ROOT / 'docs' / page.file.src_uri
    return translated(markdown, path) if path.is_file() else markdown


def on_page_content(content: str, page: Page, **kwargs) -> str:
    """Draws formulas, and takes Sphinx's roles out of docstrings."""
    content = re.sub(
        r'<(span|div) class="arithmatex">(.*?)</\1>', _formula, content, flags=re.DOTALL
    )
    return re.sub(r':(?:class|func|meth|data|attr|mod):(<code>)~?', r'\1', content)


def on_post_page(output: str, page: Page, **kwargs) -> str:
    """Puts a script of the site in the place of one that would be fetched."""
    return output.replace(FETCHED, get_relative_url('file_worker.js', page.url))


def on_post_template(output_content: str, **kwargs) -> str:
    """The same for the page of what is not found."""
    return output_content.replace(FETCHED, 'file_worker.js')


def translated(text: str, path: Path) -> str:
    """A document's text with the links of its page on the site.

    Args:
        text (str): Markdown with links relative to ``path``.
        path (Path): The document.

    Returns:
        str: The text, code apart, with links relative to the page.
    """
    folder = PurePosixPath(_uri(path).partition('#')[0]).parent

    def link(match: re.Match) -> str:
        name, target = match.groups()
        target, _, anchor = target.partition('#')
        place = (path.parent / target).resolve()
        if place.is_dir() and place.is_relative_to(ROOT / 'docs'):
            return name  # A site lists no folders.
        uri = _uri(place)
        uri, _, own_anchor = uri.partition('#')
        uri = os.path.relpath(uri, folder)
        anchor = own_anchor or anchor
        return f'[{name}]({uri}#{anchor})' if anchor else f'[{name}]({uri})'

    parts = re.split(r'(```.*?```)', text, flags=re.DOTALL)
    parts[::2] = [re.sub(LINK, link, p) for p in parts[::2]]
    return ''.join(parts)


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path in TEXTS:
        return TEXTS[path]
    if path.is_relative_to(ROOT / 'docs'):
        return path.relative_to(ROOT / 'docs').as_posix()
    for folder in CONFIGS:
        if path.is_relative_to(folder):
            anchor = f'#{_anchor(path, folder)}' if path.suffix in SHOWN else ''
            return _config_page(folder) + anchor
    return path.relative_to(ROOT).as_posix()


def _room_page(room: Path) -> str:
    return f'api/{room.name}.md'


def _config_page(folder: Path) -> str:
    return f'configs/{folder.name.strip("_")}.md'


def _anchor(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix().replace('/', '-')


def _text_of_configs(folder: Path) -> str:
    readme = folder / 'README.md'
    parts = [f'# `configs/{folder.name}`\n']
    if readme.is_file():
        _, _, text = readme.read_text().partition('\n')  # Without its heading.
        parts.append(translated(text, readme))
    paths = (path for path in folder.rglob('*') if path.suffix in SHOWN)
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        parts.append(f'## {name} {{#{_anchor(path, folder)}}}\n')
        parts.append(f'```{SHOWN[path.suffix]}\n{path.read_text()}```\n')
    return '\n'.join(parts)


def _formula(match: re.Match) -> str:
    tex = html.unescape(match[2])[2:-2]  # Without \( \) or \[ \].
    return convert(tex, display='block' if match[1] == 'div' else 'inline')
