"""The record of machines, layers and snapshots, and the journal of what is being done to them."""
