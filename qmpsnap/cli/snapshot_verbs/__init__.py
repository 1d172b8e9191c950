"""Commands about snapshots, layers and jobs, one file each."""
