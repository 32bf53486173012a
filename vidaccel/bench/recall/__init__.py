"""What a causal student still knows of a place when the camera comes back to it."""
