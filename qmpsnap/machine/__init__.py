"""A machine on its host: spec to argv, the QEMU process, console and guest agent."""
