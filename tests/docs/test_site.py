"""The documentation site: it builds without a warning, and works offline."""

import os
import re
import subprocess
import sys

import pytest
from tool_runs import ROOT

for package in ('mkdocs', 'material', 'mkdocstrings', 'latex2mathml'):
    pytest.importorskip(package, reason='pip install -r requirements/docs.txt')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp('site')
    # Not --quiet, which silences what --strict counts.
    line = ['mkdocs', 'build', '--strict', '--site-dir', str(folder)]
    done = subprocess.run(
        [sys.executable, '-m', *line],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
    )
    assert done.returncode == 0, done.stderr
    # Links, anchors and pages outside of the navigation are among its warnings.
    assert 'WARNING' not in done.stdout + done.stderr
    return folder


def test_has_all_pages(site):
    for path in ROOT.glob('docs/*.md'):
        assert (site / f'{path.stem}.html').is_file(), path
    home = (site / 'index.html').read_text()
    assert 'branches_to_kernel.svg' in home
    for name in re.findall(r'<img[^>]* src="([^"]+)"', home):
        assert (site / name).is_file(), name


def test_works_offline(site):
    """Nothing is loaded from another place; links may lead there."""
    for path in site.rglob('*.html'):
        text = path.read_text()
        sources = re.findall(r'<(?:script|img|iframe)\b[^>]*\bsrc="([^"]+)"', text)
        sources += re.findall(r'<link\b[^>]*\bhref="([^"]+)"', text)
        assert not [name for name in sources if '//' in name], path
    assert not re.search(r'(?:@import|url\()\s*["\']?(?:https?:)?//', _styles(site))


def _styles(site):
    return ''.join(path.read_text() for path in site.rglob('*.css'))
