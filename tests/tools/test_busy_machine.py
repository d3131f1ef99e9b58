"""How threads wait."""

import sys

import pytest
from tool_runs import TOOLS, run_apart

STOP_AT_TORCH = """
import os, runpy, sys
class Finder:
    def find_spec(name, *_):
        if name == 'torch':
            print(os.environ.get('GOMP_SPINCOUNT'))
            sys.exit()
sys.meta_path.insert(0, Finder)
sys.path.insert(0, os.path.dirname(sys.argv[1]))  # As for a script.
runpy.run_path(sys.argv[1])
"""


NAMES = (
    'train.py',
    'test.py',
    'model_converters/switch_to_deploy.py',
    'deployment/export_onnx.py',
    'deployment/quantize.py',
    'analysis_tools/quickstart_summary.py',
    'benchmarks/train_cost.py',
)


@pytest.mark.parametrize(
    ('name', 'variables', 'expected'),
    [
        *((name, {}, '1000') for name in NAMES),
        ('train.py', dict(GOMP_SPINCOUNT='7'), '7'),
        ('train.py', dict(OMP_WAIT_POLICY='ACTIVE'), 'None'),
    ],
)
def test_policy_is_set_before_torch_is_loaded(name, variables, expected, monkeypatch):
    for variable in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'):
        monkeypatch.delenv(variable, raising=False)
    line = sys.executable, '-c', STOP_AT_TORCH, TOOLS / name
    assert run_apart(*line, **variables).stdout.split() == [expected]
