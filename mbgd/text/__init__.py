"""Words for people: escaping what is foreign, plain ASCII where a terminal needs it, the nearest name, numbers."""
