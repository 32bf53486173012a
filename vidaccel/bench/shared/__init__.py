"""What all benchmarks are made of: a protocol that is its options, results that survive an interrupt, statistics."""
