"""Ten clients that talk, restart, leave and drop for as long as you like, eight at a time, since there are
eight places; beside them an attacker who opens connections from several addresses, drips bytes into them and
never closes one. Every frame of the clients must be answered, and the server's memory must not grow.

    python tests/soak_web.py --checkpoint out/talk --minutes 60

The server runs in this process, under the loopback address, the clients and the attacker in another. Each
line says what the server holds and how long its ticks took. Where they waited long for a core, the machine
was busy with something else, and frames are lost by that alone.
"""
import argparse
import asyncio
import multiprocessing
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

CLIENTS, PLACES = 10, 8  # so that some find it full
COUNTS = ("joined", "full", "failed", "cut", "restarts", "dropped", "sent", "answered", "lost", "attacks",
          "refused")


# ------------------------------------------------------------------------------------------------------------
# clients


async def client(http, address, rng, count, end):
    """Conversations of up to 20 s, one after another, until `end`."""
    while time.monotonic() < end:
        try:
            ws = await http.ws_connect(f"{address}/talk", headers={"Origin": address}, max_msg_size=0)
        except aiohttp.ClientError:
            count["failed"] += 1
            continue
        count["joined"] += 1
        answers = asyncio.Queue()  # numbers of the frames that were answered
        reading = asyncio.ensure_future(read(ws, answers))
        until = min(end, time.monotonic() + rng.uniform(1, 20))
        while time.monotonic() < until and not ws.closed:
            await speak(ws, answers, rng, count, until)
            if not ws.closed:
                count["restarts"] += 1
                await ws.send_str('{"type":"restart"}')
        count["full"] += ws.close_code == aiohttp.WSCloseCode.TRY_AGAIN_LATER
        count["cut"] += ws.close_code not in (None, aiohttp.WSCloseCode.TRY_AGAIN_LATER)
        if ws._response.connection and rng.random() < 0.5:
            count["dropped"] += 1
            ws._response.connection.transport.abort()
        await ws.close()
        reading.cancel()
        await asyncio.sleep(rng.uniform(0, 2))


async def speak(ws, answers, rng, count, end):
    """Frames for some seconds; one in fifty is missing, as on a bad line. Then waits for all answers."""
    end, sent, n = min(end, time.monotonic() + rng.uniform(2, 10)), [], 0
    while time.monotonic() < end and not ws.closed:
        if rng.random() > 0.02:
            audio = rng.choice([0, 0, 0.1]) * np.random.default_rng(n).standard_normal(FRAME)
            try:
                await ws.send_bytes(n.to_bytes(4, "little") + (audio * 32767).astype("<i2").tobytes())
            except ConnectionError:
                break
            sent.append(n)
        n += 1
        await asyncio.sleep(0.08)
    if ws.close_code == aiohttp.WSCloseCode.TRY_AGAIN_LATER:
        return
    for _ in range(100):
        if answers.qsize() >= len(sent):
            break
        await asyncio.sleep(0.05)
    found = [answers.get_nowait() for _ in range(answers.qsize())]
    assert found == sorted({*found} & {*sent}), "answers that nobody asked for, or in another order"
    count["sent"] += len(sent)
    count["answered"] += len(found)
    count["lost"] += len(sent) - len(found)


async def read(ws, answers):
    async for message in ws:
        if message.type == aiohttp.WSMsgType.BINARY:
            answers.put_nowait(int.from_bytes(message.data[:4], "little"))


async def attacker(port, attacks, rng, count, end):
    """Opens so many connections, drips and never closes; what the server closes is opened again."""
    beginnings = (b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", b"GET /talk HTTP/1.1\r\nHost: a\r\n\r\n",
                  b"\x16\x03\x01\x02\x00", b"POST /lesson HTTP/1.1\r\nContent-Length: 100000\r\n\r\n",
                  b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: keep-alive\r\n\r\n" * 3)
    several = sys.platform == "linux"  # where every 127.x.x.x is this machine's
    held = []
    while time.monotonic() < end:
        for _ in range(min(10, attacks - len(held))):
            source = (f"127.0.0.{rng.randint(1, 8)}", 0) if several else None
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=source)
            except OSError:
                break
            writer.write(rng.choice(beginnings))
            held.append(writer)
            count["attacks"] += 1
        for writer in rng.sample(held, len(held) // 4):
            writer.write(b"a")
        count["refused"] += sum(writer.transport.is_closing() for writer in held)
        held = [writer for writer in held if not writer.transport.is_closing()]
        await asyncio.sleep(0.1)
    for writer in held:
        writer.transport.abort()


async def clients(args, pipe):
    """All of them, in a process of their own. Sends the counts every second."""
    port, count = pipe.recv(), dict.fromkeys(COUNTS, 0)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60 * args.minutes
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        tasks = [asyncio.ensure_future(client(http, address, random.Random(i), count, end))
                 for i in range(CLIENTS)]
        tasks.append(asyncio.ensure_future(attacker(port, args.attacks, random.Random(0), count, end)))
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=1, return_when=asyncio.ALL_COMPLETED)
            pipe.send(dict(count))
        await asyncio.gather(*tasks)


def clients_process(args, pipe):
    asyncio.run(clients(args, pipe))
    pipe.close()


# ------------------------------------------------------------------------------------------------------------
# the server


class Ticks:
    """Times the engine's ticks, in ms: how long they took, worked, and waited for a core; their mean, and the
    longest."""

    def __init__(self, server):
        self.tick, self.ticks = server.tick, []
        server.tick = self

    def __call__(self):
        before = self.clocks()
        results = self.tick()
        if results:
            self.ticks.append(np.subtract(self.clocks(), before))
        return results

    def clocks(self):
        with open("/proc/thread-self/schedstat") as f:
            worked, waited, _ = map(int, f.read().split())
        return time.monotonic_ns() / 1e6, worked / 1e6, waited / 1e6

    def __str__(self):
        ticks, self.ticks = self.ticks, []
        show = lambda name, t: "{} {:.0f} ms (work {:.0f}, waiting for a core {:.0f})".format(name, *t)
        return f"{show('ticks', np.mean(ticks, 0))}, {show('longest', max(ticks, key=max))}" if ticks else ""


def held(server):
    with open("/proc/self/statm") as f:
        memory = int(f.read().split()[1]) * resource.getpagesize() / 2 ** 20
    sessions = sum(s is not None for s in server.engine.sessions)
    return (f"memory {memory:.0f} MiB, files {len(os.listdir('/proc/self/fd'))}, sessions {sessions}, "
            f"connections {len(server.runner.server.connections)}, tasks {len(asyncio.all_tasks())}")


async def soak(args, process, pipe):
    server = web.Server(DuplexModel.load(args.checkpoint), web.Limits(sessions=PLACES), log=lambda line: None)
    ticks = Ticks(server)
    pipe.send(await server.start("127.0.0.1", 0))
    begun, count, shown = time.monotonic(), {}, 0
    print(f"    0 s: {held(server)}", flush=True)
    while process.is_alive():
        await asyncio.sleep(0.2)
        while pipe.poll():
            count = pipe.recv()
        if time.monotonic() - begun > shown + args.every:
            shown += args.every
            print(f"{shown:5.0f} s: {held(server)}, {ticks}; {count}", flush=True)
    await asyncio.sleep(10)  # the last connections that were answered go
    print(f"all gone: {held(server)}; {count}", flush=True)
    assert process.exitcode == 0 and count["sent"] == count["answered"] > 0, count
    assert not count["lost"] + count["failed"] + count["cut"], count
    assert not any(server.engine.sessions) and not server.clients and not server.runner.server.connections
    assert not server.unauthenticated
    await server.stop()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--checkpoint", default="out/tiny")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--attacks", type=int, default=150, help="connections of the attacker")
    parser.add_argument("--every", type=float, default=60, help="seconds between two lines")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=clients_process, args=(args, theirs), daemon=True)
    process.start()
    try:
        asyncio.run(soak(args, process, ours))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}; `make demo` leaves what this needs")


if __name__ == "__main__":
    main()
