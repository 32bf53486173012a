"""Measurements with a fixed protocol: what EasyCache costs in fidelity and saves in time, and what a model can do."""
