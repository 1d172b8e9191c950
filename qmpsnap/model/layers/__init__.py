"""What a disk is made of: layers, chains, snapshots, saved memory."""
