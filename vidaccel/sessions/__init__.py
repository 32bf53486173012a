"""Rollouts on disk: sessions, branches, exact states. Knows no model."""
