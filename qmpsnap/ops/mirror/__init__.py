"""A disk is copied while the guest runs: the verb, the job, and recovery."""
