"""What goes wrong, and what did nothing."""

from __future__ import annotations


class SurgeryError(ValueError):
    """A model, mask or batch that a function here cannot work on; the message says what to do instead."""


class NoEffectWarning(UserWarning):
    """A tweak was asked for and changed nothing, e.g. because the model has no site for it."""
