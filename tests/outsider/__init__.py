"""A tester that is not of the house: it knows qmpsnap by its public API and command line, and images by QEMU's tools.

What it holds true comes from its own oracle (:mod:`known`): bytes that it has written itself, or that a guest of its
own counts (:mod:`writer`). ``scripts/outsider`` runs it.
"""
