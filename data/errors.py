"""The error that data/ raises for whatever its user can put right."""


class DataError(ValueError):
    """A file, line or setting that cannot be used: names it, its value and the remedy."""
