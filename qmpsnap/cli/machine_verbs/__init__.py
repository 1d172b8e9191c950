"""Commands about machines and this host, one file each."""
