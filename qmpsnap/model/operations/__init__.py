"""Journalled operations: their plans, their steps, and what they came to."""
