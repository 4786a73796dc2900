"""TRL's GRPO with credit for tokens: the trainer, its options, and the training script."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
