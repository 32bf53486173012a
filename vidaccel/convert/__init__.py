"""Published checkpoints into diffusers folders: strict about every key, one tensor in memory at a time."""
