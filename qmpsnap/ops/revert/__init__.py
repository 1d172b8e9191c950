"""Going back to a snapshot: planned, done by new overlays or inside the running QEMU."""
