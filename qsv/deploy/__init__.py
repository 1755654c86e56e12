"""From trained parameters to one small file, and from that file to embeddings."""

import lazy_loader

# The names are those of __init__.pyi; what one needs is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
