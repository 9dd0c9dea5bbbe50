"""Memory that the CPU workers of one host share: see README.md."""
