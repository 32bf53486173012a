"""Offline distillation against online and against none: what it costs and what it gives, on the storybook world."""
