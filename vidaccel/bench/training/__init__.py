"""Cost of training a causal student of published size."""
