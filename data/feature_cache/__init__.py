"""A cache of what a frozen ViT makes of a training set, computed once."""
