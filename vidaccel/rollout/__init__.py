"""Autoregressive rollouts: chunk after chunk of video from a causal student with a bounded memory."""
