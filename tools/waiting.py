"""Lets waiting threads of OpenMP sleep soon.

They run in circles first, and on a machine that is busy with other programs they take
the time of those that they wait for. GNU OpenMP reads these variables when PyTorch is
loaded, and importing mmorepa loads PyTorch. So tools run this file by its path.
"""

import os

ENV = {}
if 'OMP_WAIT_POLICY' not in os.environ:
    ENV['GOMP_SPINCOUNT'] = os.environ.get('GOMP_SPINCOUNT', '1000')
