"""A loaded model: what it says about itself, and how it is run, spread, loaded and cut."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
