"""The store in one SQLite file: schema, questions, journal."""
