"""Step → this worker's examples: the plan, the order, keyed randomness, loading."""
