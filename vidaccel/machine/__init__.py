"""What this pipeline and this computer are: parts, memory, attention backends, environment, clocks."""
