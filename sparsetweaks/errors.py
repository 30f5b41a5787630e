"""What goes wrong, and what did nothing."""

from __future__ import annotations


class SurgeryError(ValueError):
    """A model, mask or batch that a function here cannot work on; the message says what to do instead."""


class MissingPackageError(SurgeryError, ImportError):
    """A package that only this one function needs cannot be imported; the message says how to install it."""


class UnmaskedZerosWarning(UserWarning):
    """Weights that look pruned, as they are exactly zero, have no mask; the message says what they count as here."""


class NoEffectWarning(UserWarning):
    """A tweak was asked for and changed nothing, e.g. because the model has no site for it."""
