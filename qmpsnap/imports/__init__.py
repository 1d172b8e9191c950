"""Machines of other managers, from their own descriptions: text in, values out; no file is opened here."""
