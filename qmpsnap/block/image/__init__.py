"""Single images: read, made, verified and removed."""
