"""Drivers of storages that make snapshots, each on the real storage."""
