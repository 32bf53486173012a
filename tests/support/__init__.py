"""What several test files use: tiny models, scripted models, fixtures on disk."""
