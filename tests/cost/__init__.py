"""What verbs cost, counted: the same on every host, whatever else runs there."""
