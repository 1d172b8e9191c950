"""A lost store is made again from what lies on the disks."""
