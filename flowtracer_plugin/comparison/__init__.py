"""What right and wrong texts do differently, and how far chance alone goes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
