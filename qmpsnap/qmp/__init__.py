"""QEMU's monitor: sessions with deadlines, typed commands, foreign errors translated once."""
