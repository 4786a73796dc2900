"""Does a score find the tokens that an answer depends on? Knock-outs in one text or a data set."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
