"""kvfusion-rag: answers that do not change when the retriever shuffles its documents (arXiv 2501.07523).

The public names are listed in ``__init__.pyi``. Each is imported on first use, so that ``import kvfusion_rag`` does
not import torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
