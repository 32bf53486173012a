"""`vidaccel bench easycache | caches | ...`: measurements under a fixed protocol, one class each; see `table`."""
