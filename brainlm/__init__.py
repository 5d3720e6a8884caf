"""BrainLM: masked autoencoders for brain activity. ``import brainlm`` needs torch and numpy alone.

``from brainlm import BrainLM`` gives the model; it is loaded when first asked for, so that programs that do not need
torch do not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainlm.model import BrainLM

__version__ = "0.1.0"
__all__ = ["BrainLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "BrainLM":
        from brainlm.model import BrainLM

        return BrainLM
    raise AttributeError(f"module 'brainlm' has no attribute {name!r}")
