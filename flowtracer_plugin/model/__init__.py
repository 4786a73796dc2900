"""A loaded model: what it says about itself, and how to load, run, spread and cut it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
