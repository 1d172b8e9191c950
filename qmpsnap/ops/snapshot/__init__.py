"""External and full snapshots: requested, planned, taken, deleted, renamed, recovered."""
