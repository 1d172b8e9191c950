"""Images and graphs: what QEMU, qemu-img and the files themselves say of layers."""
