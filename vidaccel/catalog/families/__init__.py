"""Families of video pipelines: one row each, from which tiny random models are made and tests are run."""
