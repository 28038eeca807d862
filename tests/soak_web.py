"""Eight clients that join, restart and drop for as long as you like: the server's memory must not grow.
Beside them two that only talk, and an attacker who opens connections, drips bytes into them and never closes
one: those two must lose no frame.

    python tests/soak_web.py --checkpoint out/tiny --minutes 60

The server runs in this process, under the loopback address. Each line says what it holds at that time. A
machine whose cores are busy loses frames by itself: compare with --attacks 0 beside the same load.
"""
import argparse
import asyncio
import os
import random
import resource
import sys
import time

try:
    import aiohttp
except ImportError:
    sys.exit("error: needs the extra 'web': pip install '.[web]'")
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from live import web  # noqa: E402
from chat import DuplexModel  # noqa: E402
from mimi import FRAME  # noqa: E402

CLIENTS, PLACES = 8, 6  # so that some find it full
STEADY = 2  # those that only talk


async def client(http, address, rng, count, end):
    """Conversations of up to 20 s, one after another, until `end`."""
    while time.monotonic() < end:
        async with http.ws_connect(f"{address}/talk", headers={"Origin": address}, max_msg_size=0) as ws:
            count["joined"] += 1
            answers = asyncio.ensure_future(read(ws, count))
            try:
                await speak(ws, rng, count, min(end, time.monotonic() + rng.uniform(1, 20)))
                if rng.random() < 0.5 and ws._response.connection:
                    count["dropped"] += 1
                    ws._response.connection.transport.abort()
            except ConnectionError:
                pass
            finally:
                answers.cancel()
        await asyncio.sleep(rng.uniform(0, 2))


async def steady(http, address, count, end):
    """Conversations of half a minute, one after another as places allow. Every frame must be answered."""
    while time.monotonic() < end:
        async with http.ws_connect(f"{address}/talk", headers={"Origin": address}, max_msg_size=0) as ws:
            if (await ws.receive()).type != aiohttp.WSMsgType.TEXT:
                count["refused"] += 1
                await asyncio.sleep(0.2)
                continue
            answered = dict.fromkeys(("answered", "full"), 0)
            answers, n = asyncio.ensure_future(read(ws, answered)), 0
            until = min(end, time.monotonic() + 30)
            while time.monotonic() < until and not ws.closed:
                await ws.send_bytes(n.to_bytes(4, "little") + bytes(2 * FRAME))
                n += 1
                await asyncio.sleep(0.08)
            for _ in range(50):
                if answered["answered"] >= n:
                    break
                await asyncio.sleep(0.1)
            answers.cancel()
            count["steady"] += n
            count["lost"] += n - answered["answered"]


async def attacker(port, attacks, rng, count, end):
    """Opens so many connections, drips and never closes; what the server closes is opened again."""
    beginnings = (b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", b"GET /talk HTTP/1.1\r\nHost: a\r\n\r\n",
                  b"\x16\x03\x01\x02\x00", b"POST /lesson HTTP/1.1\r\nContent-Length: 100000\r\n\r\n",
                  b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: keep-alive\r\n\r\n" * 3)
    held = []
    while time.monotonic() < end:
        for _ in range(min(10, attacks - len(held))):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                break
            writer.write(rng.choice(beginnings))
            held.append(writer)
            count["attacks"] += 1
        for writer in rng.sample(held, len(held) // 4):
            writer.write(b"a")
        held = [writer for writer in held if not writer.transport.is_closing()]
        await asyncio.sleep(0.1)
    for writer in held:
        writer.transport.abort()


async def speak(ws, rng, count, end):
    n = 0
    while time.monotonic() < end and not ws.closed:
        audio = rng.choice([0, 0, 0.1]) * np.random.default_rng(n).standard_normal(FRAME)
        if rng.random() > 0.02:
            await ws.send_bytes(n.to_bytes(4, "little") + (audio * 32767).astype("<i2").tobytes())
            count["sent"] += 1
        n += 1
        if rng.random() < 0.01:
            await ws.send_str('{"type":"restart"}')
            n = 0
        await asyncio.sleep(0.08)


async def read(ws, count):
    async for message in ws:
        count["answered"] += message.type == aiohttp.WSMsgType.BINARY
    count["full"] += ws.close_code == 1013


def held(server):
    with open("/proc/self/statm") as f:
        memory = int(f.read().split()[1]) * resource.getpagesize() / 2 ** 20
    sessions = sum(s is not None for s in server.engine.sessions)
    return (f"memory {memory:.0f} MiB, files {len(os.listdir('/proc/self/fd'))}, sessions {sessions}, "
            f"connections {len(server.runner.server.connections)}, tasks {len(asyncio.all_tasks())}")


async def soak(args):
    limits = web.Limits(sessions=PLACES + STEADY)
    server = web.Server(DuplexModel.load(args.checkpoint), limits, log=lambda line: None)
    count = dict.fromkeys(("joined", "full", "dropped", "sent", "answered", "steady", "lost", "refused",
                           "attacks"), 0)
    port = await server.start("127.0.0.1", 0)
    address = f"http://127.0.0.1:{port}"
    begun, end = time.monotonic(), time.monotonic() + 60 * args.minutes
    print(f"    0 s: {held(server)}", flush=True)
    async with aiohttp.ClientSession() as http:
        clients = [asyncio.ensure_future(steady(http, address, count, end)) for _ in range(STEADY)]
        clients += [asyncio.ensure_future(client(http, address, random.Random(i), count, end))
                    for i in range(CLIENTS)]
        clients.append(asyncio.ensure_future(attacker(port, args.attacks, random.Random(0), count, end)))
        while time.monotonic() < end:
            await asyncio.sleep(min(args.every, max(0.1, end - time.monotonic())))
            print(f"{time.monotonic() - begun:5.0f} s: {held(server)}; {count}", flush=True)
        await asyncio.gather(*clients)
    await asyncio.sleep(10)  # the last connections that were answered go
    print(f"all gone: {held(server)}; {count}", flush=True)
    assert not any(server.engine.sessions) and not server.clients and not server.runner.server.connections
    assert not server.unauthenticated and count["steady"] and not count["lost"], count
    await server.stop()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--checkpoint", default="out/tiny")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--attacks", type=int, default=150, help="connections of the attacker")
    parser.add_argument("--every", type=float, default=60, help="seconds between two lines")
    try:
        asyncio.run(soak(parser.parse_args()))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}; `make demo` leaves what this needs")


if __name__ == "__main__":
    main()
