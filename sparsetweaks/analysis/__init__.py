"""See why: curvature and loss landscapes of a sparse network, in the space where its mask lets it move."""

__all__: list[str] = []
