"""From a model and a text to a trace: `wrap`, the tracer, and the trace that people hold."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
