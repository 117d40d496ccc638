"""What the command ``adacm2`` and the scripts do: they join the library to the data.

The only part of the library that knows ``data/``, for which training and preparing need a clone.
"""
