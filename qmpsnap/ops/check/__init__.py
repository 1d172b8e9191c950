"""What is promised of a machine, held against store, files and QEMU; what of it can be repaired."""
