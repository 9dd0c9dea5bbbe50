"""Files: read with size limits and checked against a schema, written atomically, locked."""
