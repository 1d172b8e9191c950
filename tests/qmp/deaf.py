"""The part of a fake monitor that hears no events, for what must not wait for any; see :mod:`qmpsnap.testing`."""

from contextlib import AbstractAsyncContextManager

from qmpsnap.qmp.session import Bell


class Deaf:
    """A monitor that nobody may listen to."""

    def listen(self, *events: str) -> AbstractAsyncContextManager[Bell]:
        raise AssertionError(f"nobody should listen to {events} here")

    async def send_descriptor(self, descriptor: int) -> None:
        raise AssertionError(f"nobody should send {descriptor} here")
