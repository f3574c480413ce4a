"""What is built; build_tools/build_ext.py says how. Metadata lives in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent))
from build_tools.build_ext import CMakeBuild

setup(ext_modules=[Extension("pydit._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
