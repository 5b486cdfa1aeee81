"""AddressVLM: a vision-language model names the street address of a photo. The domain, without Ray."""

from typing import TYPE_CHECKING, Any

from addressvlm.errors import InputError

if TYPE_CHECKING:
    from addressvlm.inference import Localizer

__all__ = ["InputError", "Localizer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Localizer` on first use: an import of it here would load torch into programs that need none."""
    if name == "Localizer":
        from addressvlm.inference import Localizer

        return Localizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
