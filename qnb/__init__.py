"""What does quantizing this model cost, and what does it give?"""

__version__ = "0.1.0"

from qnb.error import InputError
from qnb.study import Study

__all__ = ["InputError", "Study", "__version__"]
