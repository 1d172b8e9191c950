"""Ways in: machines that something else has launched or managed until now."""
