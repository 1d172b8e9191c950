"""Snapshots by the storage itself: one driver a kind of storage, all behind one Protocol."""
