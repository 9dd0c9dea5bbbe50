"""How training goes: the clock, traces, and what is logged when."""
