"""What ``scripts/bench`` runs: qmpsnap timed beside a bare QMP script and beside libvirt, in turns, on one host."""
