"""Training of the embedded model on the storybook world: the autoencoder, then the transformer, then the export.

Every trainer is a generator that yields records of numbers; `vidaccel train` shows them, scripts may use them directly.
"""
