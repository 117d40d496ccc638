"""Training: what learns, the exact gradient, one step, and the loop around it."""
