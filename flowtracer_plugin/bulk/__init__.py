"""Whole data sets: rows to traces, tables and pages, shard by shard, resumable."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
