"""What a causal student does with what it is told: soft changes, places never seen before, a minute, odd prompts."""
