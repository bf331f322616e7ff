"""Every error a user can cause: one message that names the place, the value and the remedy."""

import errno

import torch


class PrunekitError(Exception):
    """Base of all errors that the user can fix; the command line prints them and exits with 2."""


class SpecError(PrunekitError):
    """A pipeline file, an option or a combination of components that cannot work."""


class PluginError(PrunekitError):
    """A plugin that cannot be loaded, or a name that no plugin (or more than one) provides."""


class ModelError(PrunekitError):
    """A model that cannot be loaded or that no architecture adapter can cut."""


class DataError(PrunekitError):
    """Calibration or evaluation text, or a batch, that is missing, empty, too short or too long."""


class PruneWarning(UserWarning):
    """What to know of a pruning that went well, such as a cut that rounds to nothing."""


class StoreError(PrunekitError):
    """A results store of ablations that cannot be opened, written or resumed."""


class NonFiniteError(PrunekitError):
    """NaN or infinity where a pruning decision would have been taken."""


class SingularError(PrunekitError):
    """A covariance that cannot be solved for the slope of a compensation."""


LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined] # torch's annotations do not export it
"""What compensators raise where a covariance cannot be solved."""

FINITE_REMEDY = "Run the model unpruned on this text, and try bfloat16 or float32 if it is float16"
"""What to do where activations are not finite."""

MEMORY = ("DefaultCPUAllocator", "allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
"""Parts of what torch and the system say where memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch raises a RuntimeError for that on a processor, the system an OSError."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, ImportError)) and any(part in str(error) for part in MEMORY)
