"""What Open-Sora 1.2 and 2.0 need around their networks: sizes, prompts, schedule, conditioning. Pure functions."""
