"""The errors a user meets, named by who must act. Each is also a builtin, so that plain ``except ValueError`` works."""


class BrainLMError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(BrainLMError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class DataError(BrainLMError, ValueError):
    """A recording, atlas, table or data set is not what it must be."""


class StoreError(BrainLMError, OSError):
    """Storage could not be read or written."""


class CheckpointError(BrainLMError, ValueError):
    """A checkpoint or snapshot is incomplete, damaged, or does not fit."""


class TrainingError(BrainLMError, RuntimeError):
    """Training cannot go on: a loss is not finite, a rank is lost."""
