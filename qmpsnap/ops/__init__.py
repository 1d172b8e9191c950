"""The verbs: each module a pure `plan` and an async `run`; the only place where machine, block and store meet."""
