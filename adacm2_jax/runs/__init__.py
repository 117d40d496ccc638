"""Runs: the typed experiment, what it leaves on disk, and how both are read back."""
