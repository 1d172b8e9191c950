"""Layers become one: commit and stream, what can be refused beforehand, the jobs, and recovery."""
