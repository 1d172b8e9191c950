"""What a machine is: its spec, and what the store records of it."""
