"""Comparisons of right with wrong texts, and the part of chance in their differences."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
