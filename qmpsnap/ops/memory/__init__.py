"""A guest's memory: how it can be saved, saving it, loading it, and what the guest is told afterwards."""
