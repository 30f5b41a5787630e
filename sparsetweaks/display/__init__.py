"""Pictures of models: `summary` of one, `diff` of two, as text in a terminal and as HTML in Jupyter."""
