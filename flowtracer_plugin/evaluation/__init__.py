"""Does a score find the tokens that the answer depends on? Knock-outs over texts and data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
