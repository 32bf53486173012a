"""Models that diffusers does not have, in its own terms: `ModelMixin`, `ConfigMixin`, `from_pretrained`."""
