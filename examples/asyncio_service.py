"""An asyncio service that takes snapshots for its clients, one JSON object per line on a Unix socket.

Usage: python asyncio_service.py SOCKET
    request   {"machine": "web", "snapshot": "before-deploy"}
    answer    {"snapshot": "before-deploy", "error": null}

Machines are independent: clients of different machines do not wait for each other. A second request for a machine that
is busy is refused at once with the code "locked". SIGTERM ends the service; it cancels what is in progress, and qmpsnap
passes a cancellation on only when the snapshot is either complete or undone.
"""

import asyncio
import json
import os
import signal
import sys

import qmpsnap


async def answer(q: qmpsnap.Controller, line: bytes) -> dict[str, object]:
    """Do what one line asks for; returns the answer."""
    try:
        request = json.loads(line)
        vm = await q.machine(str(request["machine"]))
        snapshot = await vm.snapshot(str(request["snapshot"]))
    except qmpsnap.QmpsnapError as error:
        return {"snapshot": None, "error": error.as_dict()}
    except (ValueError, TypeError, KeyError):
        return {"snapshot": None, "error": {"code": "usage", "message": "not a request"}}
    return {"snapshot": snapshot.name, "error": None}


async def main(path: str) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    clients: set[asyncio.Task[object]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        clients.add(task)
        try:
            async for line in reader:
                writer.write(json.dumps(await answer(q, line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # the client is gone, or its line is too long
        finally:
            clients.discard(task)
            writer.close()

    async with qmpsnap.open() as q:
        os.umask(0o077)  # nobody else may connect
        server = await asyncio.start_unix_server(serve, path)
        print(f"listening on {path}", flush=True)
        await stop.wait()
        server.close()
        for client in [*clients]:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
