"""The error of this package."""


class WeightError(ValueError):
    """Weights that cannot be found, read or written, or that do not fit the model."""
