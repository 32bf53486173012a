"""Frames per second and memory of a rollout at full size."""
