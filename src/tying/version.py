"""The version of the package, as the installer knows it."""

from importlib.metadata import version

__version__ = version("tying")
