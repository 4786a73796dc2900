"""Texts: how they become tokens, and which tokens are question and answer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
