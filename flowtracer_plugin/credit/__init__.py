"""Which tokens get the credit: measures of tokens, scorers that choose by them, weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
