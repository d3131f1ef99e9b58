from xml.etree import ElementTree

import pytest
from tool_runs import ROOT, run_here

pytest.importorskip('matplotlib')


def test_draws_what_the_documents_show(tmp_path):
    run_here('analysis_tools/drawings.py', '--out', tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in ROOT.glob('docs/images/*.svg')}
    for name in names:
        shapes = ElementTree.parse(tmp_path / name).iter(
            '{http://www.w3.org/2000/svg}path'
        )
        assert len(list(shapes)) > 20
