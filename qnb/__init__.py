"""What does quantizing this model cost, and what does it give?"""

__version__ = "1.0.0"

import logging
import warnings
from typing import Any

from qnb.errors import InputError

__all__ = ["InputError", "Study", "__version__"]

# kaleido 1 says at every import of Plotly 5 that Plotly's own ``write_image`` will not work; nothing here calls it
warnings.filterwarnings("ignore", r"\s*Warning: You have Plotly version", UserWarning)
# torchao says at every import which of its kernels are for other devices, and torch which of its calls are deprecated
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import `Study` when it is asked for: the command line must be able to say which library is missing."""
    if name != "Study":
        raise AttributeError(f"module 'qnb' has no attribute {name!r}")
    from qnb.study import Study

    return Study
