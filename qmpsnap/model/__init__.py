"""Frozen values and the pure rules between them: no I/O, no async, no clock."""
