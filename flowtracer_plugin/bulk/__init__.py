"""Whole data sets: rows to traces, tables and pages, by shards and workers, resumable."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
