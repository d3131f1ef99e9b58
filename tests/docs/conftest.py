import sys
from pathlib import Path

# How tools are run is written down there.
sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
