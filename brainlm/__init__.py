"""BrainLM: masked autoencoders for brain activity. ``import brainlm`` needs torch and numpy alone."""

__version__ = "0.1.0"
