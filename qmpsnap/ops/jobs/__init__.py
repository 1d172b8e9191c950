"""Block jobs of an operation, and the moment from which their result counts."""
