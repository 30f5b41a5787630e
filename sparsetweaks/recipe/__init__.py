"""Training-recipe tweaks (paper 3.2): layer scales and soft labels."""
