"""AddressVLM: the street address of a photo, told by a vision-language model (the domain, without Ray)."""

from addressvlm.errors import InputError

__all__ = ["InputError"]
__version__ = "0.1.0"
