"""The version, in one place: read by CMake, setup.py and the package."""

__version__ = "0.1.0"
