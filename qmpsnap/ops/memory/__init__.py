"""A guest's memory: how it can be saved, saving it, loading it, and setting clock and network afterwards."""
