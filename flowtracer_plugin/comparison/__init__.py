"""Comparisons of right and wrong texts, and permutation tests of their differences."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
