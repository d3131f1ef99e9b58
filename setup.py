"""The build step that pyproject.toml has no word for.

OpenMMLab packages carry their configs, tools and model index along in a folder
``.mim``, where MIM and MMEngine look for them.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CARRIED = ('configs', 'tools', 'model-index.yml')
# How the figures of the documents were made: for those who work on a clone.
STUDIES = ('benchmarks', 'drawings.py', 'model_zoo.py', 'scaling_experiment.py')


class BuildWithMim(build_py):
    """Copies what goes to ``mmorepa/.mim`` into the wheel, and never into the tree.

    An editable installation has no copies: the package finds the clone's own files.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'mmorepa', '.mim')
        # An earlier build may have left files that are gone from the tree.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in CARRIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns('__pycache__', '*.pyc', '.*', *STUDIES)
                shutil.copytree(source, target / name, ignore=ignored)
            else:
                shutil.copy2(source, target / name)


setup(cmdclass={'build_py': BuildWithMim})
