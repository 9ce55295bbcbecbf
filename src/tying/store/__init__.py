"""A network on disk: each value once, and back."""

from tying.store.network import KIND, VERSION, encode, load, load_plan, save

__all__ = ["KIND", "VERSION", "encode", "load", "load_plan", "save"]
