"""Snapshots inside the images: their tags, taking one, and ending one that broke off."""
