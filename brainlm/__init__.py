"""BrainLM: masked autoencoders for brain activity. ``import brainlm`` needs torch and numpy alone.

``from brainlm import BrainLM`` gives the model. Every name is loaded when first asked for, so that programs that do not
need torch do not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainlm.atlas import Atlas
    from brainlm.impulse_response import forward_response
    from brainlm.input_contract import InputContract
    from brainlm.model import BrainLM
    from brainlm.perturbation import PerturbationSettings, perturb
    from brainlm.predictor import Predictor
    from brainlm.recording import Recording
    from brainlm.windows import cut_windows, pad_windows

__version__ = "0.1.0"
__all__ = [
    "Atlas",
    "BrainLM",
    "InputContract",
    "PerturbationSettings",
    "Predictor",
    "Recording",
    "__version__",
    "cut_windows",
    "forward_response",
    "pad_windows",
    "perturb",
]

_HOMES = {
    "Atlas": "brainlm.atlas",
    "BrainLM": "brainlm.model",
    "InputContract": "brainlm.input_contract",
    "PerturbationSettings": "brainlm.perturbation",
    "Predictor": "brainlm.predictor",
    "Recording": "brainlm.recording",
    "cut_windows": "brainlm.windows",
    "forward_response": "brainlm.impulse_response",
    "pad_windows": "brainlm.windows",
    "perturb": "brainlm.perturbation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'brainlm' has no attribute {name!r}")
