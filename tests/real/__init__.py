"""A guest of the real kind: Debian, systemd, PostgreSQL under load; ``scripts/real`` runs it."""
