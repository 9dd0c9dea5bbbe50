"""Files: read with bounds and checked against a schema, written whole or not at all, locked."""
