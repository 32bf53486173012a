"""The memory of an autoregressive rollout: which frames stay (integers) and their keys and values (tensors)."""
