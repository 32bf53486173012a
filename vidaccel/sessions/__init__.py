"""Rollouts on disk: sessions, branches, exact states. Knows no model."""

MAIN = "main"  # the branch that every session has
