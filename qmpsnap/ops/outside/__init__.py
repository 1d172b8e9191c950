"""Other programs and other people: who else has a machine's images open, and what they have done to them."""
