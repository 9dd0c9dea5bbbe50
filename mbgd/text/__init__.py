"""Text for people: escaping of foreign text, plain ASCII where a terminal needs it, the nearest name, numbers."""
