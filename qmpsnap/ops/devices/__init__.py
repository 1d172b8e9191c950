"""Disks that a machine is given, or that are taken from it: ``disk attach`` and ``disk detach``."""
