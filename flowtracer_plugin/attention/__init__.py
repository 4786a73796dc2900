"""One attention call: how an adapter describes it, and the probabilities computed from it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
