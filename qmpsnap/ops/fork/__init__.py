"""Machines that go on from another one's full snapshot."""
