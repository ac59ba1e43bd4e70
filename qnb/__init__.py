"""What does quantizing this model cost, and what does it give?"""

from qnb.error import InputError

__all__ = ["InputError"]
__version__ = "0.1.0"
