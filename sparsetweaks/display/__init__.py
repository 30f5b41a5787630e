"""Pictures of models: `summary` of one, `diff` of two, as text in a terminal and as HTML in Jupyter."""

from sparsetweaks.display.overview import Overview, diff, summary

__all__ = ["Overview", "diff", "summary"]
