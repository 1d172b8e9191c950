"""How a QEMU is started: its arguments, its rights, its surroundings, what it can do."""
