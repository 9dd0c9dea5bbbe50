"""What is tried before training, and compared during it."""
