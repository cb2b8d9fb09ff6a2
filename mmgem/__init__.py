"""mmgem: one model that retrieves and writes, for images and for any box of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmgem.model import MMGem

__version__ = "0.1.0"
__all__ = ["MMGem", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the model when it is asked for, so that `mmgem --help` need not wait for torch."""
    if name == "MMGem":
        from mmgem.model import MMGem

        return MMGem
    raise AttributeError(f"module 'mmgem' has no attribute {name!r}")
