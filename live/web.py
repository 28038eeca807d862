"""The page and its server: each WebSocket is one session of engine.py, 80 ms at a time both ways.

    browser                                             server
    GET /                                          -->  web.html, the only file there is
    GET /talk, a WebSocket                         -->  a place in the engine, or the word that all are taken
    binary: number of the frame, 1920 samples      -->  the session's queue --.
    text:   {"type": "restart"}                    -->                        | tick, in a thread of its own
    binary: number of the frame heard, 1920 said   <--  ----------------------'
    text:   {"type": "text", "time": 1.2, "text": " seven"}, {"type": "begin"}

A number is 4 bytes, a sample 2, little-endian. Frames of a gap are concealed, so that what is said keeps the clock of what is
heard. Who breaks a rule or a limit is told in the reason of the close, and so is the log, in one line.
"""
import asyncio
import hmac
import json
import os
import secrets
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from live.engine import QUEUE, Engine
from live.jitter import conceal
from live.transcript import Transcript
from mimi import FRAME
from streams import FRAME_RATE

try:
    from aiohttp import WSCloseCode, WSMsgType
    from aiohttp import web as http
except ImportError:
    raise ValueError("--web needs the extra 'web': pip install '.[web]'") from None

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "web.html")
HERE = ("127.0.0.1", "localhost", "::1")
BYTES = 4 + 2 * FRAME  # of a binary message
RATE, BURST = 1.2 * FRAME_RATE, 50  # messages a second, and how many at once after a stall
RESTART = 10  # messages that one restart counts for
BEHIND = 50  # messages that may wait for a client who reads too slowly
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; "
                               "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self)", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store", "Connection": "close"}


@dataclass(frozen=True)
class Limits:
    sessions: int = 4
    total: float = 900.0  # seconds that a conversation may last
    idle: float = 30.0  # seconds without a frame
    request: float = 10.0  # seconds that a connection may take to ask for something
    send: float = 5.0  # seconds that one message may take to be taken
    connections: int = 64


class Over(Exception):
    """A conversation ends: (close code, why, in a few words for the page and the log)"""


class Guest:
    """One client's conversation: numbers of frames in, what is to be sent out."""

    def __init__(self, limits):
        self.session, self.transcript, self.out = None, None, asyncio.Queue()
        self.limits, self.begun = limits, time.monotonic()
        self.heard_at, self.allowance, self.counted = self.begun, BURST, self.begun

    def begin(self, session, duplex):
        self.session, self.transcript = session, Transcript(duplex)
        self.asked = deque()  # of the frames that the engine has taken: (number, whether it was sent, not concealed)
        self.next, self.last = 0, np.zeros(FRAME, np.float32)
        self.out.put_nowait(json.dumps({"type": "begin"}))

    def seconds_left(self):
        """(seconds, what it means when they are over)"""
        now = time.monotonic()
        idle, total = self.heard_at + self.limits.idle - now, self.begun + self.limits.total - now
        if idle < total:
            return idle, f"nothing was heard for {self.limits.idle:g} seconds"
        return total, f"a conversation lasts {self.limits.total / 60:g} minutes"

    def spend(self, messages):
        now = time.monotonic()
        self.allowance, self.counted = min(BURST, self.allowance + (now - self.counted) * RATE), now
        if self.allowance < messages:
            raise Over(WSCloseCode.POLICY_VIOLATION, "too many messages")
        self.allowance -= messages

    def hear(self, data):
        """A binary message: the frame, and what stands for those missing before it, into the session's queue."""
        if len(data) != BYTES:
            raise Over(WSCloseCode.POLICY_VIOLATION, f"a frame is {BYTES} bytes")
        n, frame = int.from_bytes(data[:4], "little"), np.frombuffer(data, "<i2", offset=4).astype(np.float32) / 32768
        self.heard_at = time.monotonic()
        if n < self.next:
            return
        room = QUEUE - 1 - len(self.session.queue)  # beside the frame itself
        for missing in range(max(self.next, n - room), n):
            self.take(missing, False, conceal(self.last))
            self.last = np.zeros(FRAME, np.float32)
        self.take(n, True, frame)
        self.next, self.last = n + 1, frame

    def take(self, n, sent, frame):
        self.asked.append((n, sent))
        if not self.session.hear(frame):  # the queue is full: what comes too fast is not heard
            self.asked.pop()

    def say(self, token, sound):
        """What the engine gave for the oldest frame asked."""
        n, sent = self.asked.popleft()
        if self.transcript.add(n, token):
            self.out.put_nowait(json.dumps({"type": "text", **self.transcript.pieces[-1]}))
        if sent:
            samples = (sound.clamp(-1, 1) * 32767).round().numpy().astype("<i2")
            self.out.put_nowait(n.to_bytes(4, "little") + samples.tobytes())


class Server:
    """Serves until cancelled. The engine ticks in a thread; everything else happens in the event loop's."""

    def __init__(self, duplex, limits=Limits(), token=None, log=lambda line: print(line, file=sys.stderr, flush=True)):
        self.duplex, self.limits, self.token, self.log = duplex, limits, token, log
        self.engine, self.guests = Engine(duplex, limits.sessions), {}
        self.fed, self.ended = threading.Event(), threading.Event()
        self.asking = set()  # connections that have not yet asked for anything
        with open(PAGE, "rb") as f:
            self.page = f.read()

    # the engine

    def ticks(self):
        """The thread: ticks as long as somebody has a frame waiting. While one runs, the frames of others gather for the next."""
        try:
            while not self.ended.is_set():
                self.fed.wait(0.2)
                self.fed.clear()
                while results := self.engine.tick():
                    self.loop.call_soon_threadsafe(self.deliver, results)
        except Exception as e:
            self.loop.call_soon_threadsafe(self.broken.set_exception, e)
            raise

    def warm_up(self):
        """The first frame is slow: it is nobody's."""
        session = self.engine.join()
        session.hear(np.zeros(FRAME))
        self.engine.tick()
        self.engine.leave(session)

    def deliver(self, results):
        for session, said in results.items():
            guest = self.guests.get(session)  # gone, if it has left or begun anew since
            if guest and said:
                guest.say(*said)
            elif guest:
                guest.out.put_nowait(Over(WSCloseCode.INTERNAL_ERROR, "the model's logits are not numbers"))

    # requests

    @http.middleware
    async def guard(self, request, handler):
        """Nobody but the page gets further, and it only with the token, or, where there is none, from this machine."""
        self.asking.discard(request.protocol)
        try:
            self.check(request)
            return await handler(request)
        except http.HTTPException as e:
            self.log(f"{request.remote} {request.method} {request.path[:60]!r}: {e.status} {e.text or e.reason}")
            return http.Response(status=e.status, text=f"{e.text or e.reason}\n", headers=HEADERS)

    def check(self, request):
        if self.token is None and hostname(request.host) not in HERE:  # a foreign name that leads here (DNS rebinding)
            raise http.HTTPForbidden(text="this name is not served here")
        if self.token is not None and not hmac.compare_digest(request.query.get("token", "").encode(), self.token.encode()):
            raise http.HTTPForbidden(text="the address needs its token: ?token=...")
        origin = request.headers.get("Origin", "")
        if request.path == "/talk" and urlsplit(origin).netloc != request.host:
            raise http.HTTPForbidden(text=f"wrong origin {origin[:60]!r}")

    async def send_page(self, request):
        return http.Response(body=self.page, content_type="text/html", charset="utf-8", headers=HEADERS)

    async def talk(self, request):
        ws = http.WebSocketResponse(max_msg_size=BYTES + 1, heartbeat=10, autoping=False, compress=False, timeout=2)
        await ws.prepare(request)
        guest = Guest(self.limits)
        try:
            session = self.engine.join(secrets.randbits(31))
            if session is None:
                raise Over(WSCloseCode.TRY_AGAIN_LATER, f"full: all {self.limits.sessions} places are taken")
            self.seat(guest, session)
            self.log(f"{request.remote} talks: {len(self.guests)} of {self.limits.sessions}")
            await first_to_fail(self.read(ws, guest), self.write(ws, guest))
        except Over as e:
            code, why = e.args
        except asyncio.CancelledError:
            code, why = WSCloseCode.GOING_AWAY, "the server ends"
        finally:
            self.guests.pop(guest.session, None)
            self.engine.leave(guest.session)
        self.log(f"{request.remote} {why}, after {time.monotonic() - guest.begun:.0f} s")
        await self.close(request, ws, code, why)
        return ws

    def seat(self, guest, session):
        guest.begin(session, self.duplex)
        self.guests[session] = guest

    async def close(self, request, ws, code, why):
        try:
            await asyncio.wait_for(ws.close(code=code, message=why.encode()[:123]), 3)
        except (TimeoutError, asyncio.TimeoutError, ConnectionError):
            pass
        if request.transport:  # whoever has not read so far never will
            request.transport.abort() if code == WSCloseCode.POLICY_VIOLATION else request.transport.close()

    async def read(self, ws, guest):
        while True:
            seconds, why = guest.seconds_left()
            try:
                message = await ws.receive(timeout=max(0, seconds))
            except (TimeoutError, asyncio.TimeoutError):
                raise Over(WSCloseCode.OK, why) from None
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                raise Over(ws.close_code or WSCloseCode.OK, "left" if message.type != WSMsgType.ERROR else f"{message.data}"[:100])
            guest.spend(1)
            if message.type == WSMsgType.PING:
                await ws.pong(message.data)
            elif message.type == WSMsgType.BINARY:
                guest.hear(message.data)
                self.fed.set()
            elif message.type == WSMsgType.TEXT:
                self.restart(guest, message.data)

    def restart(self, guest, text):
        if text != '{"type":"restart"}':
            raise Over(WSCloseCode.POLICY_VIOLATION, "not a message of the page's")
        guest.spend(RESTART)
        self.guests.pop(guest.session)
        self.seat(guest, self.engine.reset(guest.session))

    async def write(self, ws, guest):
        while True:
            message = await guest.out.get()
            if isinstance(message, Over):
                raise message
            if guest.out.qsize() > BEHIND:
                raise Over(WSCloseCode.POLICY_VIOLATION, "reads too slowly")
            send = ws.send_str if isinstance(message, str) else ws.send_bytes
            try:
                await asyncio.wait_for(send(message), self.limits.send)
            except (TimeoutError, asyncio.TimeoutError):
                raise Over(WSCloseCode.POLICY_VIOLATION, "reads too slowly") from None
            except ConnectionError:
                raise Over(WSCloseCode.OK, "left") from None

    # connections

    def connect(self):
        """A new connection's protocol. One too many, or one that asks too slowly, is cut off."""
        protocol = self.runner.server()
        full = len(self.asking.union(self.runner.server.connections)) >= self.limits.connections
        self.asking.add(protocol)
        seconds, why = (0, "is one too many") if full else (self.limits.request, "asked for nothing in time")
        self.loop.call_later(seconds, self.cut, protocol, why)
        return protocol

    def cut(self, protocol, why):
        if protocol in self.asking and protocol.transport:
            self.log(f"{protocol.transport.get_extra_info('peername')[0]} {why}")
            protocol.force_close()
        self.asking.discard(protocol)

    async def start(self, host, port):
        """Listens from here on. The port, which is another than `port` if that is 0."""
        app = http.Application(middlewares=[self.guard], client_max_size=1024)
        app.add_routes([http.get("/", self.send_page), http.get("/talk", self.talk)])
        self.loop, self.broken = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        self.runner = http.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=3)
        await self.runner.setup()
        self.listening = await self.loop.create_server(self.connect, host, port)
        self.warm_up()
        self.thread = threading.Thread(target=self.ticks, daemon=True)
        self.thread.start()
        return self.listening.sockets[0].getsockname()[1]

    async def stop(self):
        """Everybody is told, the thread is done, nothing is left."""
        self.listening.close()
        for guest in list(self.guests.values()):
            guest.out.put_nowait(Over(WSCloseCode.GOING_AWAY, "the server ends"))
        await self.runner.cleanup()
        self.ended.set()
        self.fed.set()
        await asyncio.to_thread(self.thread.join)


async def first_to_fail(*work):
    """Runs all until one raises; raises that, and cancels the others."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        while left := [task for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.1)  # and once more: before Python 3.12 wait_for may swallow a cancellation
        await asyncio.gather(*tasks, return_exceptions=True)


def hostname(host):
    """'localhost:8080' -> 'localhost', '[::1]:8080' -> '::1'"""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def serve(duplex, host, port, sessions, token):
    """Until Ctrl-C. OSError if the port is taken, ValueError if there is no such port, or no place."""
    if sessions < 1 or not 0 <= port < 2 ** 16:
        raise ValueError("--sessions is at least 1, --port below 65536")
    if host not in HERE:
        token = token or secrets.token_urlsafe(12)
    try:
        asyncio.run(run(Server(duplex, Limits(sessions=sessions), token), host, port))
    except KeyboardInterrupt:
        print("\nEnded.")


async def run(server, host, port):
    port = await server.start(host, port)
    where = f"[{host}]" if ":" in host else host
    print(f"ConversationState to it at http://{where}:{port}/{f'?token={server.token}' if server.token else ''} (Ctrl-C ends)", flush=True)
    try:
        await server.broken
    finally:
        await server.stop()
