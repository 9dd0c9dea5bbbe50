"""The clock, profiler traces, and when Python collects garbage."""
