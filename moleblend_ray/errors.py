"""The exception family.

Every error a user can cause or cure is a :class:`MoleBlendError`; its message says what happened, where,
what was found, what was expected and what to do. Command-line entry points print these without a traceback.
"""


class MoleBlendError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(MoleBlendError):
    """A setting is unknown, of the wrong type, out of range or contradicts another one."""


class StorageError(MoleBlendError):
    """A URI cannot be read, written or listed: missing, refused, or out of reach."""


class DataError(MoleBlendError):
    """A source file, shard, manifest or packed buffer is damaged, unsupported or incomplete."""


class CheckpointError(MoleBlendError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run or model."""


class TrainingError(MoleBlendError):
    """Training cannot go on: a gap in the data order, a non-finite loss, a lost worker group."""
