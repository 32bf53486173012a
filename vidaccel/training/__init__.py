"""Training of the embedded models on the storybook world.

`vidaccel train vae`, then `transformer`, then `export` make the model of short videos; `causal` and `export-causal`
make the causal student of `vidaccel rollout` from its transformer.

Every trainer is a generator that yields records of numbers; `vidaccel train` shows them, scripts may use them directly.
"""
