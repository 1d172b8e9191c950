"""What every verb rests on: the context it works in, keys, room, requests and new layers."""
