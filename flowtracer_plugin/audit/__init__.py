"""Which credit would help training? The policy gradients that each scorer's weights give."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
