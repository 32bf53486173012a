"""Tiny random models of every family, made from the rows of the catalog."""
