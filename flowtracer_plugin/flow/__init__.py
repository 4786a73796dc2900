"""Graphs and the flow along them, on plain arrays: no model, no text."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
