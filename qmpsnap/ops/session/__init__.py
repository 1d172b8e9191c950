"""The frame of a verb that changes a machine: lock, recovery, the state it plans from, frozen file systems."""
