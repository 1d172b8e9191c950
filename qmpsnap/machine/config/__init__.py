"""A machine's spec from YAML, and what the host and the package add to it."""
