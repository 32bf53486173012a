"""What a few-step student loses where steps of a chunk are left out."""
