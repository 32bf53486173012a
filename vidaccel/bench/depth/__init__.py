"""Layers that share what is remembered, against other memories of as many bytes."""
