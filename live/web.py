"""The web page and its server: each WebSocket is one session of the engine, 80 ms at a time both ways.

    browser                                             server
    GET /                                          -->  web.html, the only file there is
    GET /talk, a WebSocket                         -->  a session of the engine, or closed: all are in use
    binary: number of the frame, 1920 samples      -->  the session's queue --.
    binary: 1/2 to 3 s, for the next restart's voice                          |
    text:   {"type": "restart", "text": role}      -->                        | tick, in a thread of its own
    text:   {"type": "type", "text": "..."}        -->                        |
    binary: number of the frame heard, 1920 said   <--  ----------------------'
    text:   {"type": "text", "time": 1.2, "text": " seven"}, {"type": "begin"}
    POST /lesson...                                -->  lessons.py: teach it your voice

A connection is unauthenticated until its request has shown the right token. There are few such connections,
fewer for each address, and each for seconds only: one too many takes the place of the oldest, so nobody can
lock out the others.

A number is 4 bytes, a sample 2, little-endian. Missing frames are concealed, so the reply keeps the clock
of what is heard. A client that breaks a rule or a limit is disconnected; the reason is in the close message
and in the log, in one line.
"""
import asyncio
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import sys
import threading
import time
import webbrowser
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import numpy as np
import torch

from files.audio import SAMPLE_RATE
from files.checkpoint import layouts_of
from files.fields import one_line
from layouts.prompts import SECONDS, make_prompt
from layouts.typed import typed_tokens
from live.engine import QUEUE, Engine
from live.jitter import conceal
from live.lessons import Lessons
from live.transcript import Transcript
from mimi import FRAME
from streams import FRAME_RATE

try:
    from aiohttp import WSCloseCode, WSMsgType, __version__
    from aiohttp import web as http
except ImportError:
    raise ValueError("--web needs the extra 'web': pip install '.[web]'") from None
if [int(n) for n in re.findall(r"\d+", __version__)[:3]] < [3, 14, 5]:  # one frame can take its memory
    raise ValueError(f"--web needs aiohttp 3.14.5, not {__version__}: pip install -U '.[web]'")

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "web.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MESSAGE_BYTES = 4 + 2 * FRAME  # of a binary message
RATE, BURST = 1.2 * FRAME_RATE, 50  # token bucket: messages a second, and at once after a stall
TOY_VOCAB = 2048  # text tokens at most of a model of the toy world
MAX_TEXT = 120  # characters of a role or of what is typed
RESTART = 10  # messages that one restart counts for
VOICE = 25  # and a restart with another voice, which has to be encoded
VOICE_BYTES = SAMPLE_RATE, 2 * SECONDS * SAMPLE_RATE  # half a second to three
FIELDS = {"typed": ["typed"], "prompts": ["role", "voice"]}  # of the page, by the layouts' file
MAX_UNSENT = 50  # messages that may wait for a client that reads too slowly
HEADERS = {
    "Content-Security-Policy":
        "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self)", "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Connection": "close"}


@dataclass(frozen=True)
class Limits:
    sessions: int = 4
    total: float = 900.0  # seconds that a conversation may last
    idle: float = 30.0  # seconds without a frame
    request: float = 10.0  # seconds that a connection may take until its request
    send: float = 5.0  # seconds until the client accepts a message
    connections: int = 64  # unauthenticated ones and conversations
    address: int = 16  # of these, from one address
    grace: float = 0.2  # seconds that each has for its request, even if many come at once
    linger: float = 5.0  # seconds until a connection is gone after its answer


class Ended(Exception):
    """A conversation has ended: (close code, reason in a few words, for the page and the log)."""


class Client:
    """One client's conversation: which frames have come, and what is to be sent."""

    def __init__(self, limits):
        self.session, self.transcript, self.out = None, None, asyncio.Queue()
        self.limits, self.started = limits, time.monotonic()
        self.last_frame_at, self.allowance, self.allowed_at = self.started, BURST, self.started

    def begin(self, session, duplex):
        self.session, self.transcript = session, Transcript(duplex)
        self.pending = deque()  # frames in the engine's queue: (number, whether it was received)
        self.next, self.last, self.voice = 0, None, None
        self.out.put_nowait(json.dumps({"type": "begin"}))

    def seconds_left(self):
        """(seconds until the conversation must end, the reason)"""
        now = time.monotonic()
        idle, total = self.last_frame_at + self.limits.idle - now, self.started + self.limits.total - now
        if idle < total:
            return idle, f"nothing was heard for {self.limits.idle:g} seconds"
        return total, f"a conversation lasts {self.limits.total / 60:g} minutes"

    def count_messages(self, messages):
        """Token bucket: raises Ended for a client that sends too many."""
        now = time.monotonic()
        self.allowance, self.allowed_at = min(BURST, self.allowance + (now - self.allowed_at) * RATE), now
        if self.allowance < messages:
            raise Ended(WSCloseCode.POLICY_VIOLATION, "too many messages")
        self.allowance -= messages

    def hear(self, data):
        """Puts the frame of a binary message, and concealed ones for those missing before it, into the
        queue; or keeps what it holds as the next restart's voice."""
        if VOICE_BYTES[0] <= len(data) <= VOICE_BYTES[1] and len(data) % 2 == 0:
            self.voice = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
            return
        if len(data) != MESSAGE_BYTES:
            raise Ended(WSCloseCode.POLICY_VIOLATION, f"a frame is {MESSAGE_BYTES} bytes")
        n = int.from_bytes(data[:4], "little")
        frame = np.frombuffer(data, "<i2", offset=4).astype(np.float32) / 32768
        self.last_frame_at = time.monotonic()
        if n < self.next:
            return
        room = QUEUE - 1 - len(self.session.queue)  # beside the frame itself
        for missing in range(max(self.next, n - room), n):
            self.enqueue(missing, False, conceal(self.last))
            self.last = None
        self.enqueue(n, True, frame)
        self.next, self.last = n + 1, frame

    def enqueue(self, n, sent, frame):
        self.pending.append((n, sent))
        if not self.session.hear(frame):  # the queue is full: a client that sends too fast is not heard
            self.pending.pop()

    def say(self, token, audio):
        """Sends what the engine gave for the oldest pending frame."""
        n, sent = self.pending.popleft()
        if self.transcript.add(n, token):
            self.out.put_nowait(json.dumps({"type": "text", **self.transcript.pieces[-1]}))
        if sent:
            samples = (audio.clamp(-1, 1) * 32767).round().numpy().astype("<i2")
            self.out.put_nowait(n.to_bytes(4, "little") + samples.tobytes())


def log_to_stderr(line):
    print(line if line.isprintable() else ascii(line), file=sys.stderr, flush=True)  # no codes for terminals


class Server:
    """Serves until cancelled. The engine ticks in a thread of its own, the rest runs in the event loop's."""

    def __init__(self, duplex, limits=Limits(), token=None, log=log_to_stderr, checkpoint=None, layouts=()):
        """checkpoint: the model's folder; if it is one of the toy world, it can be taught a voice.
        layouts: names of those that it was trained on; the page has fields for what they are about."""
        teachable = checkpoint and duplex.vocab.text_size <= TOY_VOCAB
        self.lessons = Lessons(checkpoint, duplex, self.use) if teachable else None
        self.duplex, self.limits, self.token, self.log = duplex, limits, token, log
        self.engine, self.clients = Engine(duplex, limits.sessions), {}
        self.frames_waiting, self.stopping = threading.Event(), threading.Event()
        self.ticking, self.builder = threading.Lock(), ThreadPoolExecutor(1)  # of engines and of prompts
        self.unauthenticated = {}  # connection -> (its transport, its address), the oldest first
        self.refused, self.refused_at = 0, -math.inf  # how many were one too many, and when it was logged
        self.asked = 0  # requests of lessons that are being answered
        with open(PAGE, "rb") as f:
            self.page = with_fields(f.read(), layouts)
        self.largest = VOICE_BYTES[1] if b" voice" in self.page[:200] else MESSAGE_BYTES

    # the engine

    def run_engine(self):
        """The engine's thread: ticks as long as any frame waits. Frames that come meanwhile wait for the
        next tick."""
        try:
            while not self.stopping.is_set():
                self.frames_waiting.wait(0.2)
                self.frames_waiting.clear()
                while results := self.tick():
                    self.loop.call_soon_threadsafe(self.deliver, results)
        except Exception as e:
            self.loop.call_soon_threadsafe(self.engine_failed.set_exception, e)
            raise

    def tick(self):
        with self.ticking:
            return self.engine.tick()

    async def use(self, duplex):
        """Go on with another model; conversations with this one end."""
        def build():
            with self.ticking:  # on a GPU, nothing else may run while a CUDA graph is captured
                engine = Engine(duplex, self.limits.sessions)
                warm_up(engine)
                return engine
        self.engine, self.duplex = await self.loop.run_in_executor(self.builder, build), duplex
        for client in self.clients.values():
            client.out.put_nowait(Ended(WSCloseCode.SERVICE_RESTART, "another model takes over; press Talk"))

    def deliver(self, results):
        for session, said in results.items():
            client = self.clients.get(session)  # None if it has left or restarted since
            if client and said:
                client.say(*said)
            elif client:
                client.out.put_nowait(Ended(WSCloseCode.INTERNAL_ERROR, "the model's logits are not numbers"))

    # requests

    @http.middleware
    async def authorise(self, request, handler):
        """Refuses requests without the token or, if there is no token, for a host that is not this machine.
        Every other error is an answer of one line, too."""
        transport = request.transport
        try:
            self.check(request)
            self.unauthenticated.pop(request.protocol, None)
            response = await handler(request)
        except http.HTTPException as e:
            response = self.refusal(request, e.status, e.text or e.reason)
        except Exception as e:
            response = self.refusal(request, 500, f"{type(e).__name__}: {one_line(e, 100)}")
        if not isinstance(response, http.WebSocketResponse):
            response.force_close()
            if transport:
                self.loop.call_later(self.limits.linger, transport.abort)
        return response

    def refusal(self, request, status, reason):
        reason = one_line(reason, 150)
        self.log(f"{request.remote} {request.method[:20]} {request.path[:60]!r}: {status} {reason}")
        return http.Response(status=status, text=f"{reason}\n", headers=HEADERS)

    def check(self, request):
        if len(request.headers.getall("Host", ())) != 1:
            raise http.HTTPBadRequest(text="a request names one host")
        # DNS rebinding: a foreign name that resolves to this machine
        if self.token is None and hostname(request.host) not in LOOPBACK:
            raise http.HTTPForbidden(text="this name is not served here")
        token = request.query.get("token", "").encode(errors="replace")
        if self.token is not None and not hmac.compare_digest(token, self.token.encode()):
            raise http.HTTPForbidden(text="the address needs its token: ?token=...")
        origin = request.headers.get("Origin", "")
        try:
            netloc = urlsplit(origin).netloc
        except ValueError:
            raise http.HTTPBadRequest(text=f"malformed origin {origin[:60]!r}") from None
        if request.path.startswith(("/talk", "/lesson")) and netloc != request.host:
            raise http.HTTPForbidden(text=f"wrong origin {origin[:60]!r}")
        key = request.headers.get("Sec-WebSocket-Key", "")
        if request.path == "/talk" and not re.fullmatch(r"[A-Za-z0-9+/]{22}==", key):
            raise http.HTTPBadRequest(text=f"malformed key {key[:60]!r}")
        if "Content-Encoding" in request.headers:
            raise http.HTTPUnsupportedMediaType(text="the page sends nothing compressed")

    async def send_page(self, request):
        return http.Response(body=self.page, content_type="text/html", charset="utf-8", headers=HEADERS)

    async def teach(self, request):
        if self.asked >= self.limits.sessions:
            raise http.HTTPServiceUnavailable(text="too many requests at once")
        self.asked += 1
        try:
            if not self.lessons:
                return http.json_response({"refused": "this model cannot be taught here"}, headers=HEADERS)
            return http.json_response(await self.lessons.answer(request), headers=HEADERS)
        except (ValueError, OSError) as e:
            self.log(f"{request.remote} {request.path[:60]!r}: {e}")
            return http.json_response({"refused": str(e)}, status=409, headers=HEADERS)
        finally:
            self.asked -= 1

    async def talk(self, request):
        ws = http.WebSocketResponse(max_msg_size=self.largest + 1, heartbeat=10, autoping=False,
                                    compress=False, timeout=2)
        await ws.prepare(request)
        client = Client(self.limits)
        try:
            session = self.engine.join(secrets.randbits(31))
            if session is None:
                raise Ended(WSCloseCode.TRY_AGAIN_LATER, f"full: all {self.limits.sessions} places are taken")
            self.start_session(client, session)
            self.log(f"{request.remote} talks: {len(self.clients)} of {self.limits.sessions}")
            await first_to_fail(self.read(ws, client), self.write(ws, client))
        except Ended as e:
            code, reason = e.args
        except asyncio.CancelledError:
            code, reason = WSCloseCode.GOING_AWAY, "the server ends"
        finally:
            self.clients.pop(client.session, None)
            self.engine.leave(client.session)
        self.log(f"{request.remote} {reason}, after {time.monotonic() - client.started:.0f} s")
        await self.close(request, ws, code, reason)
        return ws

    def start_session(self, client, session):
        client.begin(session, self.duplex)
        self.clients[session] = client

    async def close(self, request, ws, code, reason):
        try:
            await asyncio.wait_for(ws.close(code=code, message=reason.encode()[:123]), 3)
        except (TimeoutError, asyncio.TimeoutError, ConnectionError):
            pass
        if request.transport:  # a client that has not read the message by now never will
            request.transport.abort() if code == WSCloseCode.POLICY_VIOLATION else request.transport.close()
            self.loop.call_later(self.limits.linger, request.transport.abort)

    async def read(self, ws, client):
        while True:
            seconds, reason = client.seconds_left()
            try:
                message = await ws.receive(timeout=max(0, seconds))
            except (TimeoutError, asyncio.TimeoutError):
                raise Ended(WSCloseCode.OK, reason) from None
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
                raise Ended(ws.close_code or WSCloseCode.OK, "left")
            if message.type == WSMsgType.ERROR:
                raise Ended(ws.close_code or WSCloseCode.OK, f"{message.data}"[:100])
            client.count_messages(1)
            if message.type == WSMsgType.PING:
                await ws.pong(message.data)
            elif message.type == WSMsgType.BINARY:
                client.hear(message.data)
                self.frames_waiting.set()
            elif message.type == WSMsgType.TEXT:
                await self.obey(client, message.data)

    async def obey(self, client, data):
        """Restarts a conversation, in a role and a voice if there are any, or gives it what the user
        types."""
        kind, text = read_message(data)
        if kind == "type":
            client.session.type(typed_tokens(text, self.duplex.vocab, self.duplex.tokenizer))
            return
        voice, client.voice = client.voice, None
        client.count_messages(RESTART if voice is None else VOICE)
        try:
            prompt = None
            if text.strip() or voice is not None:
                prompt = await self.loop.run_in_executor(self.builder, make_prompt, self.duplex, text, voice)
        except ValueError as e:
            raise Ended(WSCloseCode.POLICY_VIOLATION, str(e)) from None
        self.clients.pop(client.session, None)
        session = self.engine.reset(client.session, prompt)
        if session:  # otherwise another model has taken over
            self.start_session(client, session)

    async def write(self, ws, client):
        while True:
            message = await client.out.get()
            if isinstance(message, Ended):
                raise message
            if client.out.qsize() > MAX_UNSENT:
                raise Ended(WSCloseCode.POLICY_VIOLATION, "reads too slowly")
            send = ws.send_str if isinstance(message, str) else ws.send_bytes
            try:
                await asyncio.wait_for(send(message), self.limits.send)
            except (TimeoutError, asyncio.TimeoutError):
                raise Ended(WSCloseCode.POLICY_VIOLATION, "reads too slowly") from None
            except ConnectionError:
                raise Ended(WSCloseCode.OK, "left") from None

    # connections

    def connect(self):
        """The protocol of a new connection."""
        protocol = self.runner.server()
        self.loop.call_later(0, self.admit, protocol)  # as soon as it has a transport
        return protocol

    def admit(self, protocol):
        """A new connection is unauthenticated until its request is checked."""
        if protocol.transport:
            address = network(protocol.transport.get_extra_info("peername"))
            self.unauthenticated[protocol] = protocol.transport, address
            few = len(self.unauthenticated) <= 4 * self.limits.connections
            self.loop.call_later(self.limits.grace if few else 0, self.make_room, address)
            self.loop.call_later(self.limits.request, self.disconnect, protocol, "asked for nothing in time")

    def make_room(self, address):
        """If there are too many connections, of this address or in all, the oldest is disconnected."""
        self.unauthenticated = {p: (t, a) for p, (t, a) in self.unauthenticated.items()
                                if not t.is_closing()}
        neighbours = [p for p, (_, a) in self.unauthenticated.items() if a == address]
        if len(neighbours) > self.limits.address:
            self.disconnect(neighbours[0])
        elif len(self.unauthenticated) + len(self.clients) > self.limits.connections:
            self.disconnect(next(iter(self.unauthenticated)))

    def disconnect(self, protocol, reason=None):
        """At once, whatever is still to be sent. Without a reason it is one too many; this is logged once a
        second."""
        transport, address = self.unauthenticated.pop(protocol, (None, None))
        if not transport or transport.is_closing():
            return
        transport.abort()
        self.refused += not reason
        if reason:
            self.log(f"{address} {reason}")
        elif time.monotonic() - self.refused_at > 1:
            self.log(f"{address} is one too many" + f", like {self.refused - 1} before" * (self.refused > 1))
            self.refused, self.refused_at = 0, time.monotonic()

    async def start(self, host, port):
        """Starts to listen. Returns the port, which the system chooses if `port` is 0."""
        app = http.Application(middlewares=[self.authorise], client_max_size=1024)
        app.add_routes([http.get("/", self.send_page), http.get("/talk", self.talk),
                        http.post("/lesson", self.teach), http.post("/lesson/{what}", self.teach)])
        self.loop, self.engine_failed = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        self.runner = http.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=3,
                                     keepalive_timeout=self.limits.linger, lingering_time=1,
                                     logger=self.one_line_logger())
        await self.runner.setup()
        self.listening = await self.loop.create_server(self.connect, host, port)
        warm_up(self.engine)
        self.thread = threading.Thread(target=self.run_engine, daemon=True)
        self.thread.start()
        return self.listening.sockets[0].getsockname()[1]

    def one_line_logger(self):
        """For what aiohttp would log with a traceback, such as a request that is not HTTP."""
        logger, handler = logging.Logger("web", logging.WARNING), logging.Handler()
        handler.emit = lambda record: self.log(" ".join(record.getMessage().split())[:200])
        logger.addHandler(handler)
        return logger

    async def stop(self):
        """Tells every client, closes all connections and ends the thread."""
        self.listening.close()
        for client in list(self.clients.values()):
            client.out.put_nowait(Ended(WSCloseCode.GOING_AWAY, "the server ends"))
        if self.lessons:
            await self.lessons.stop()
        await self.runner.cleanup()
        self.stopping.set()
        self.frames_waiting.set()
        await asyncio.to_thread(self.thread.join)
        self.builder.shutdown()


def warm_up(engine):
    """The first frame is slow, so it is computed before there is a client."""
    session = engine.join()
    session.hear(np.zeros(FRAME))
    engine.tick()
    engine.leave(session)


async def first_to_fail(*work):
    """Runs all until one raises, cancels the others and raises that exception."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        while left := [task for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            # repeated, since wait_for may lose a cancellation before Python 3.12
            await asyncio.wait(left, timeout=0.1)
        await asyncio.gather(*tasks, return_exceptions=True)


def with_fields(page, layouts):
    """web.html (bytes) that shows the fields for what the model was trained on."""
    files = {name.split(":")[0] for name in layouts}
    fields = " ".join(field for file, names in FIELDS.items() if file in files for field in names)
    return page.replace(b'<html lang="en">', f'<html lang="en" data-fields=" {fields}">'.encode(), 1)


def read_message(data):
    """(type, text) of a JSON message of the page's; the text may be missing. Raises Ended for any other."""
    try:
        message = json.loads(data)
        kind, text = message["type"], message.get("text", "")
        if kind in ("restart", "type") and isinstance(text, str) and len(text) <= MAX_TEXT:
            return kind, text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise Ended(WSCloseCode.POLICY_VIOLATION, "not a message of the page's")


def hostname(host):
    """'localhost:8080' -> 'localhost', '[::1]:8080' -> '::1'"""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def network(peer):
    """The address of a peer; of IPv6 its /64, which belongs to one household."""
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except (ValueError, TypeError, IndexError):
        return str(peer)
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def serve(duplex, host, port, sessions, token, open_page=False, checkpoint=None):
    """Until Ctrl-C. token: a word, or "random" for one that other users of this machine cannot see in the
    list of its processes. OSError if the port is in use, ValueError for a bad port, number of sessions or
    token."""
    if token is not None and (not token.strip() or not token.isprintable()):
        raise ValueError("--token is a word that is hard to guess; without the flag there is a random one")
    if sessions < 1 or not 0 <= port < 2 ** 16:
        raise ValueError("--sessions is at least 1, --port below 65536")
    if token == "random" or token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(12)
    try:
        server = Server(duplex, Limits(sessions=sessions), token, checkpoint=checkpoint,
                        layouts=layouts_of(checkpoint) if checkpoint else ())
        asyncio.run(run(server, host, port, open_page))
    except KeyboardInterrupt:
        print("\nEnded.")


async def run(server, host, port, open_page):
    port = await server.start(host, port)
    where = f"[{host}]" if ":" in host else host
    query = f"?token={quote(server.token, safe='')}" if server.token else ""
    print(f"Talk to it at http://{where}:{port}/{query} (Ctrl-C ends)", flush=True)
    if open_page:
        webbrowser.open(f"http://{where}:{port}/{query}")
    try:
        await server.engine_failed
    finally:
        await server.stop()
