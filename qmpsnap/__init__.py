"""Snapshots of QEMU machines over QMP: taken, kept, merged and reverted without libvirtd."""
