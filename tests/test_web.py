"""The page's server: its protocol, its limits, and clients that break both."""
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ROOT, run
from chat import DuplexModel
from layouts.prompts import make_prompt
from mimi import FRAME

aiohttp = pytest.importorskip("aiohttp", reason="needs the extra 'web'")
from live import web  # noqa: E402

LIMITS = web.Limits(sessions=2, total=30.0, idle=10.0, request=0.5, send=1.0, connections=12, grace=0.05)


@pytest.fixture(scope="module")
def duplex(world):
    return DuplexModel.load(str(world / "flm"))


@contextlib.asynccontextmanager
async def serving(duplex, token=None, layouts=(), **limits):
    """(address, log, server, client)"""
    log = []
    server = web.Server(duplex, replace(LIMITS, **limits), token, log.append, layouts=layouts)
    port = await server.start("127.0.0.1", 0)
    address = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as client:
            yield address, log, server, client
    finally:
        await server.stop()
        assert not server.clients and not any(server.engine.sessions) and not server.thread.is_alive()


def binary(n, level=0.1):
    samples = level * np.random.default_rng(n).standard_normal(FRAME)
    return n.to_bytes(4, "little") + (samples * 32767).astype("<i2").tobytes()


def join(client, address, **more):
    return client.ws_connect(f"{address}/talk", headers={"Origin": address, **more.pop("headers", {})},
                             max_msg_size=0, **more)


async def begun(client, address, **more):
    ws = await join(client, address, **more)
    assert await ws.receive_json(timeout=10) == {"type": "begin"}
    return ws


async def answers(ws, count):
    """The next `count` binary messages and the texts before them: ([(number, samples), ...], [dict, ...])"""
    frames, texts = [], []
    while len(frames) < count:
        message = await ws.receive(timeout=20)
        if message.type == aiohttp.WSMsgType.BINARY:
            frames.append((int.from_bytes(message.data[:4], "little"),
                           np.frombuffer(message.data, "<i2", offset=4)))
        elif message.type == aiohttp.WSMsgType.TEXT:
            texts.append(json.loads(message.data))
        else:
            raise AssertionError((ws.close_code, message))
    return frames, texts


async def ending(ws):
    """(close code, reason) once the server has closed"""
    while True:
        message = await ws.receive(timeout=20)
        if message.type == aiohttp.WSMsgType.CLOSE:
            return message.data, message.extra
        if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
            return ws.close_code, ""


async def talks(ws, begin, count=3):
    """Whether a conversation goes on: each frame is answered under its number."""
    for n in range(begin, begin + count):
        await ws.send_bytes(binary(n))
    frames, _ = await answers(ws, count)
    return [n for n, _ in frames] == list(range(begin, begin + count))


def live(test):
    """An async test in a loop of its own."""
    def run_it(duplex):
        asyncio.run(asyncio.wait_for(test(duplex), 60))
    run_it.__name__ = test.__name__
    return run_it


# ------------------------------------------------------------------------------------------------------------
# the protocol


@live
async def test_each_frame_is_answered_as_the_engine_alone_would(duplex):
    async with serving(duplex) as (address, log, server, client):
        ws = await begun(client, address)
        seed = server.engine.sessions[0].seed
        for n in range(6):
            await ws.send_bytes(binary(n))
        frames, texts = await answers(ws, 6)
        sent = np.concatenate([np.frombuffer(binary(n), "<i2", offset=4) for n in range(6)])
        heard = sent.astype(np.float32) / 32768
        _, said = duplex.converse(torch.cat([torch.from_numpy(heard), torch.zeros(FRAME)])[None], seed)
        assert [n for n, _ in frames] == list(range(6))
        expected = said[0, FRAME:].clamp(-1, 1).numpy() * 32767
        assert np.abs(np.concatenate([x for _, x in frames]) - expected).max() <= 1
        assert all(t["type"] == "text" and t["text"] and 0.08 <= t["time"] <= 0.48 for t in texts)
        await ws.close()
    assert log[0] == "127.0.0.1 talks: 1 of 2" and "left" in log[1] and len(log) == 2


@live
async def test_what_is_missing_is_concealed_and_what_is_late_is_dropped(duplex):
    async with serving(duplex) as (address, _, server, client):
        ws = await begun(client, address)
        for n in (0, 1, 3, 2, 3, 4):
            await ws.send_bytes(binary(n))
        frames, _ = await answers(ws, 4)
        assert [n for n, _ in frames] == [0, 1, 3, 4]
        await ws.send_bytes(binary(2 ** 32 - 1))  # as far ahead as can be
        assert (await answers(ws, 1))[0][0][0] == 2 ** 32 - 1
        await ws.close()


@live
async def test_restart_begins_a_conversation_that_equals_the_first(duplex):
    async with serving(duplex) as (address, _, _, client):
        ws, answered = await begun(client, address), []
        for _ in range(2):
            for n in range(4):
                await ws.send_bytes(binary(n))
            answered.append((await answers(ws, 4))[0])
            await ws.send_str('{"type":"restart"}')
            assert await ws.receive_json(timeout=10) == {"type": "begin"}
        assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(*answered))
        await ws.close()


@live
async def test_a_role_and_typed_text(duplex):
    async with serving(duplex) as (address, _, server, client):
        ws = await begun(client, address)
        await ws.send_str('{"type": "restart", "text": "say it twice"}')
        assert await ws.receive_json(timeout=10) == {"type": "begin"}
        await ws.send_str('{"type": "type", "text": "up"}')
        await ws.send_bytes(binary(0))
        await answers(ws, 1)
        session, = server.clients
        assert session.prompt.shape[1] > 3 and len(session.typed) >= 2
        await ws.send_str('{"type": "restart", "text": ""}')
        assert await ws.receive_json(timeout=10) == {"type": "begin"}
        session, = server.clients
        assert session.prompt is None and not session.typed
        await ws.send_str(json.dumps({"type": "restart", "text": "zq" * 60}))
        assert (await ending(ws))[0] == 1008, "it would fill the context"


def voice(seconds=1.5, seed=5):
    x = 0.2 * np.random.default_rng(seed).standard_normal(int(24_000 * seconds))
    return (x.clip(-1, 1) * 32767).astype("<i2")


@live
async def test_a_voice_begins_its_own_conversation_and_no_other(duplex):
    """Beside one without a prompt; each is answered as if it were alone in the engine."""
    from live.engine import Engine
    prompt = make_prompt(duplex, "say it twice", torch.from_numpy(voice().astype(np.float32) / 32768))

    def alone(seed, prompt):
        engine = Engine(duplex, 2)
        session, said = engine.join(seed, prompt), []
        for n in range(5):
            session.hear(np.frombuffer(binary(n), "<i2", offset=4).astype(np.float32) / 32768)
            said.append((engine.tick()[session][1].clamp(-1, 1) * 32767).round().numpy())
        return np.stack(said)
    async with serving(duplex, layouts=["prompts:prompted"]) as (address, _, server, client):
        plain, voiced = await begun(client, address), await begun(client, address)
        await voiced.send_bytes(voice().tobytes())
        await voiced.send_str('{"type": "restart", "text": "say it twice"}')
        assert await voiced.receive_json(timeout=10) == {"type": "begin"}
        assert np.array_equal(server.engine.sessions[1].prompt, prompt) and prompt.shape[1] > 18
        for n in range(5):
            for ws in (plain, voiced):
                await ws.send_bytes(binary(n))
        for row, ws in enumerate((plain, voiced)):
            said = np.stack([x for _, x in (await answers(ws, 5))[0]])
            right = alone(server.engine.sessions[row].seed, [None, prompt][row])
            assert np.abs(said - right).max() <= 1
        await voiced.send_str('{"type": "restart"}')  # a voice is for one restart
        assert await voiced.receive_json(timeout=10) == {"type": "begin"}
        assert server.engine.sessions[1].prompt is None


@live
async def test_voices_that_are_no_voices(duplex):
    bad = {"long": voice(3.1).tobytes(), "odd": voice().tobytes()[:-1], "short": voice(0.4).tobytes()}
    async with serving(duplex, layouts=["prompts:prompted"]) as (address, log, server, client):
        good = await begun(client, address)
        for name, data in bad.items():
            ws = await begun(client, address)
            await ws.send_bytes(data)
            assert (await ending(ws))[0] == (1009 if name == "long" else 1008), name
        ws = await begun(client, address)
        for _ in range(3):  # each has to be encoded
            await ws.send_bytes(voice().tobytes())
            await ws.send_str('{"type": "restart"}')
        assert await ending(ws) == (1008, "too many messages")
        assert await talks(good, 0)
    async with serving(duplex, layouts=["typed:typed"]) as (address, log, server, client):
        ws = await begun(client, address)
        await ws.send_bytes(voice().tobytes())
        assert (await ending(ws))[0] == 1009, "the model was not trained to have one"


ODD_TEXTS = ["", " ", "\0", "\ud800", "\udfff\ud800" * 60, "<wait><asr><answer>", "\u0344" * 120,
             "\U0001f600" * 120, "\u202e\r\n\t\x85\u2028", "a" * 120, "1e999", "\u0f77" * 40 + "\ufdfa" * 80,
             "\ufffe\uffff", "\x1b[31m"]


@live
async def test_odd_texts_are_read_or_end_the_conversation_in_one_line(duplex):
    layouts = ["prompts:prompted", "typed:typed"]
    async with serving(duplex, layouts=layouts) as (address, log, server, client):
        good = await begun(client, address)
        for i, text in enumerate(ODD_TEXTS):
            ws = await begun(client, address)
            await ws.send_str(json.dumps({"type": "restart", "text": text}))
            message = await ws.receive(timeout=20)
            if message.type == aiohttp.WSMsgType.TEXT:  # it begins again
                await ws.send_str(json.dumps({"type": "type", "text": text}))
                await ws.send_bytes(binary(0))
                assert (await answers(ws, 1))[0][0][0] == 0, text
                await ws.close()
            else:
                assert message.data == 1008 and "context" in message.extra, (text, message)
            assert await talks(good, 3 * i)
        assert all(line.isprintable() for line in log) and not any(": 500 " in line for line in log), log


@pytest.mark.parametrize("data", ["", "[", "[" * 3000, "3", "{}", '{"type": "restart", "text": 3}',
                                  '{"type": "x"}', '{"type": ["type"]}',
                                  '{"type": "type", "text": "' + "a" * 121 + '"}'])
def test_what_is_not_a_message_of_the_pages(data):
    with pytest.raises(web.Ended, match="not a message"):
        web.read_message(data)


@live
async def test_a_bad_link_leaves_the_conversation_intact(duplex):
    """Bursts of 200 ms and a loss of 2% on the way there, at twice the speed."""
    from test_live import link
    async with serving(duplex) as (address, _, server, client):
        ws, arrivals = await begun(client, address), link(60, seed=2)
        begin, sent = time.monotonic(), [n for _, n in arrivals]
        next(iter(server.clients.values())).allowance = 1000
        for at, n in arrivals:
            await asyncio.sleep(max(0, begin + at / 2 - time.monotonic()))
            await ws.send_bytes(binary(n))
        frames, _ = await answers(ws, 0.9 * len(sent))
        numbers = [n for n, _ in frames]
        assert numbers == sorted(set(numbers)) and set(numbers) <= set(sent)
        await ws.close()


# ------------------------------------------------------------------------------------------------------------
# places and times


@live
async def test_a_full_server_says_so_and_a_place_that_is_left_is_free(duplex):
    async with serving(duplex) as (address, log, _, client):
        a, b = await begun(client, address), await begun(client, address)
        assert await ending(await join(client, address)) == (1013, "full: all 2 places are taken")
        assert "full" in log[-1] and await talks(a, 0)
        await a.close()
        c = await begun(client, address)
        assert await talks(b, 0) and await talks(c, 0)


@live
async def test_a_reloaded_page_takes_no_second_place(duplex):
    async with serving(duplex, sessions=1) as (address, _, server, client):
        for _ in range(4):
            ws = await begun(client, address)
            await ws.send_bytes(binary(0))
            ws._response.connection.transport.abort()  # as a browser that goes away, without a word
            for _ in range(100):
                if not server.clients:
                    break
                await asyncio.sleep(0.02)
        assert await talks(await begun(client, address), 0)


@live
async def test_idle_and_endless_conversations_end(duplex):
    async with serving(duplex, idle=0.3) as (address, log, _, client):
        ws = await begun(client, address)
        assert await ending(ws) == (1000, "nothing was heard for 0.3 seconds")
    async with serving(duplex, total=0.6, idle=0.4) as (address, log, _, client):
        ws = await begun(client, address)
        for n in range(3):
            await asyncio.sleep(0.15)
            await ws.send_bytes(binary(n))
        assert await ending(ws) == (1000, "a conversation lasts 0.01 minutes") and "lasts" in log[-1]


@live
async def test_pings_do_not_keep_a_place(duplex):
    async with serving(duplex, idle=0.4) as (address, _, _, client):
        ws = await begun(client, address)
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                await asyncio.sleep(0.1)
                await ws.ping()
        assert await ending(ws) == (1000, "nothing was heard for 0.4 seconds")


# ------------------------------------------------------------------------------------------------------------
# clients that break the rules


async def short(ws):
    await ws.send_bytes(binary(0)[:-2])


async def too_long(ws):
    await ws.send_bytes(bytes(200_000))


async def empty(ws):
    await ws.send_bytes(b"")


async def text_for_binary(ws):
    await ws.send_str("hello" * 100)


async def no_utf8(ws):
    await ws._writer.send_frame(b"\xff\xfe\xfd", 1)


async def hasty(ws):
    with contextlib.suppress(ConnectionError):
        for n in range(web.BURST + 40):
            await ws.send_bytes(binary(n))


async def restless(ws):
    with contextlib.suppress(ConnectionError):
        for _ in range(12):
            await ws.send_str('{"type":"restart"}')


@pytest.mark.parametrize("misbehave, code", [
    (short, 1008), (too_long, 1009), (empty, 1008), (text_for_binary, 1008), (no_utf8, 1007), (hasty, 1008),
    (restless, 1008)])
def test_a_client_that_breaks_a_rule_is_refused_in_one_line_and_no_other_notices(duplex, misbehave, code):
    @live
    async def test(duplex):
        async with serving(duplex) as (address, log, server, client):
            good, bad = await begun(client, address), await begun(client, address)
            assert await talks(good, 0)
            before = len(log)
            await misbehave(bad)
            with contextlib.suppress(ConnectionError):
                assert (await ending(bad))[0] in (code, 1006)
            assert await talks(good, 3)
            for _ in range(100):
                if len(log) > before:
                    break
                await asyncio.sleep(0.02)
            assert len(log) == before + 1 and len(log[-1]) < 200 and len(server.clients) == 1, log
    test(duplex)


@live
async def test_a_foreign_page_a_foreign_name_and_a_missing_token_get_nothing(duplex):
    async def status(client, url, **headers):
        async with client.get(url, headers=headers) as answer:
            return answer.status
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    async with serving(duplex) as (address, log, server, client):
        for origin in ("http://evil.example", "null", "", address.replace("127.0.0.1", "localhost"),
                       address + ".evil.example"):
            assert await status(client, f"{address}/talk", Origin=origin, **upgrade) == 403, origin
        assert len(log) == 5 and "wrong origin 'http://evil.example'" in log[0] and not server.clients
        assert await status(client, address, Host="evil.example") == 403
        assert await status(client, f"{address}/talk", Host="evil.example", Origin="http://evil.example",
                            **upgrade) == 403
        assert await status(client, address) == 200
    async with serving(duplex, token="secret") as (address, log, _, client):
        for query in ("", "?token=", "?token=Secret", "?token=secret2", "?token=%ff"):
            assert await status(client, f"{address}/{query}") == 403
            assert await status(client, f"{address}/talk{query}", Origin=address, **upgrade) == 403
        assert await status(client, f"{address}/?token=secret", Host="a.name") == 200
        assert "secret" not in "".join(log).replace("Secret", "")
        ws = await client.ws_connect(f"{address}/talk?token=secret", headers={"Origin": address})
        assert (await ws.receive_json(timeout=10))["type"] == "begin"


@live
async def test_no_file_but_the_page_is_served(duplex):
    async with serving(duplex) as (address, log, _, client):
        async with client.get(address) as answer:
            page = await answer.text()
            assert answer.status == 200 and "<title>nanoFLM</title>" in page
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        for path in ("/web.html", "/web.py", "/../web.py", "/%2e%2e/web.py", "//etc/passwd",
                     "/out/tiny/checkpoint.pt", "/favicon.ico"):
            async with client.get(aiohttp.client.URL(address + path, encoded=True)) as answer:
                assert answer.status == 404, path
        async with client.post(address, data=b"x" * 2000) as answer:
            assert answer.status == 405
        assert len(log) == 8 and all(len(line) < 200 for line in log)
    for foreign in ("src=\"http", "href=\"http", "@import", "url(http", "fetch(\"http", "fetch(`http"):
        assert foreign not in page, "the page loads nothing from other servers"


def raw(address, data=b""):
    s = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=10)
    s.sendall(data)
    return s


def is_cut(s):
    """Whether the server ends the connection within ten seconds."""
    try:
        while s.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@live
async def test_slow_and_garbled_connections_are_disconnected(duplex):
    async with serving(duplex) as (address, log, server, client):
        good = await begun(client, address)
        slow = [raw(address), raw(address, b"GET / HT"),
                raw(address, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\r\n")]
        garbled = raw(address, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        for s in (*slow, garbled):
            assert await asyncio.to_thread(is_cut, s)
        assert [line for line in log if "nothing in time" in line][2:] and await talks(good, 0)
        many = [raw(address) for _ in range(2 * LIMITS.connections)]
        await asyncio.sleep(0.1)
        assert len(server.runner.server.connections) <= LIMITS.connections
        assert "127.0.0.1 is one too many" in log
        assert await talks(good, 3)
        for s in many:
            s.close()


@live
async def test_a_client_that_does_not_read_is_disconnected(duplex):
    async with serving(duplex) as (address, log, server, client):
        good, deaf = await begun(client, address), await begun(client, address)
        next(iter(list(server.clients.values())[1:])).allowance = 1e9
        deaf._response.connection.transport.pause_reading()
        client_ = list(server.clients.values())[1]
        for n in range(web.MAX_UNSENT + 600):  # more than the sockets between them hold
            client_.out.put_nowait(binary(0) * 20)
        for _ in range(200):
            if len(server.clients) == 1:
                break
            await asyncio.sleep(0.05)
        assert "reads too slowly" in log[-1] and await talks(good, 0)


@live
async def test_a_model_that_breaks_ends_its_conversations_and_says_so(duplex):
    async with serving(duplex) as (address, log, server, client):
        ws = await begun(client, address)
        tick = server.engine.tick
        server.engine.tick = lambda: dict.fromkeys(tick())
        await ws.send_bytes(binary(0))
        assert await ending(ws) == (1011, "the model's logits are not numbers")


# ------------------------------------------------------------------------------------------------------------
# the command


def restore_sigint():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it


def command(world, *more):
    """chat.py --web in a process: (process, address)"""
    command = [sys.executable, "chat.py", "--checkpoint", str(world / "flm"), "--web", *more]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=restore_sigint)
    line = process.stdout.readline()
    assert "Talk to it at " in line, process.communicate()
    return process, line.split("Talk to it at ")[1].split(" ")[0]


@live
async def once(process_address):
    _, address = process_address
    async with aiohttp.ClientSession() as client:
        ws = await begun(client, address.rstrip("/"))
        assert await talks(ws, 0)


def test_killed_and_started_again_on_the_same_port_and_ended_by_ctrl_c(world):
    first = command(world, "--port", "0")
    once(first)
    first[0].kill()
    first[0].communicate()
    port = first[1].rstrip("/").rsplit(":", 1)[1]
    second = command(world, "--port", port)
    assert second[1] == first[1]
    once(second)
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--web", "--port", port)
    assert code == 1 and len(err.strip().splitlines()) == 1 and port in err, "a port in use is one line"
    second[0].send_signal(signal.SIGINT)
    out, err = second[0].communicate(timeout=20)
    assert second[0].returncode == 0 and "Ended." in out and "Traceback" not in err


def test_another_host_gets_a_token(world, monkeypatch):
    async def quick(server, host, port, open_page):
        assert len(server.token) >= 16 and host == "0.0.0.0" and not open_page
    monkeypatch.setattr(web, "run", quick)
    assert run("chat.py", "--checkpoint", world / "flm", "--web", "--host", "0.0.0.0")[0] == 0


def test_the_page_is_opened_in_a_browser(duplex, monkeypatch):
    opened = []
    monkeypatch.setattr(web.webbrowser, "open", opened.append)

    async def go():
        server = web.Server(duplex, LIMITS)
        task = asyncio.ensure_future(web.run(server, "127.0.0.1", 0, True))
        while not opened:
            await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as client, client.get(opened[0]) as answer:
            assert answer.status == 200
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    asyncio.run(asyncio.wait_for(go(), 60))


@live
async def test_lessons_need_the_pages_origin_and_a_model_that_can_be_taught(duplex):
    async with serving(duplex) as (address, log, server, client):
        for headers, status in (({"Origin": address}, 200), ({"Origin": "http://elsewhere"}, 403), ({}, 403)):
            async with client.post(f"{address}/lesson", headers=headers) as answer:
                assert answer.status == status
        async with client.post(f"{address}/lesson", headers={"Origin": address}) as answer:
            assert "cannot be taught" in (await answer.json())["refused"]
        async with client.get(f"{address}/lesson", headers={"Origin": address}) as answer:
            assert answer.status == 405


@live
async def test_another_model_takes_over_from_running_conversations(duplex):
    async with serving(duplex) as (address, log, server, client):
        ws = await begun(client, address)
        assert await talks(ws, 0)
        before = server.engine
        await server.use(duplex)
        code, reason = await ending(ws)
        assert "another model takes over" in reason and server.engine is not before
        ws = await begun(client, address)
        assert await talks(ws, 0)


@pytest.mark.parametrize("flags", [("--sessions", 0), ("--port", 70_000), ("--port", -1)])
def test_bad_flags_are_one_line(world, flags):
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--web", *flags)
    assert code == 1 and len(err.strip().splitlines()) == 1 and flags[0] in err


def test_the_page_is_beside_its_server():
    assert os.path.dirname(web.PAGE) == os.path.join(ROOT, "live") and os.path.getsize(web.PAGE) < 40_000


# ------------------------------------------------------------------------------------------------------------
# an attacker


@live
async def test_the_right_token_gets_in_beside_connections_that_ask_for_nothing(duplex):
    """As many as can be, from this address, that drip and never close."""
    async with serving(duplex, token="secret", request=5.0, connections=8, address=6) as served:
        address, log, server, client = served
        bad = [raw(address, b"GET /?token=wrong HTTP/1.1\r\nHost: a\r\nX-A: ") for _ in range(20)]
        for round in range(5):
            await asyncio.sleep(0.1)
            assert len(server.unauthenticated) <= 6
            ws = await client.ws_connect(f"{address}/talk?token=secret", headers={"Origin": address})
            assert await ws.receive_json(timeout=10) == {"type": "begin"} and await talks(ws, 0)
            bad += [raw(address) for _ in range(20)]
            assert await talks(ws, 3)
            await ws.close()
        cut = await asyncio.gather(*(asyncio.to_thread(is_cut, s) for s in bad[:20]))
        assert all(cut) and len(log) < 40
        for s in bad:
            s.close()
        await asyncio.sleep(0.3)
        raw(address).close()
        await asyncio.sleep(0.3)
        assert len(server.unauthenticated) <= 1, "those that are gone do not count"


@live
async def test_a_request_amid_a_burst_of_connections_is_answered(duplex):
    """They all wait in the system's queue before the server looks."""
    async with serving(duplex, token="secret", connections=8, address=6) as (address, log, server, client):
        good = raw(address, b"GET /?token=secret HTTP/1.1\r\nHost: a\r\n\r\n")
        bad = [raw(address) for _ in range(30)]
        assert (await asyncio.to_thread(good.recv, 100)).startswith(b"HTTP/1.1 200 OK")
        await asyncio.sleep(0.2)
        assert len(server.unauthenticated) <= 6 and bad


@live
async def test_what_is_refused_or_answered_is_closed(duplex):
    """Even if the client asks to keep the connection, or does not read."""
    async with serving(duplex, token="secret", linger=0.3) as (address, log, server, client):
        ask = "GET {} HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"
        for path in ("/", "/?token=secret", "/nothing?token=secret"):
            assert await asyncio.to_thread(is_cut, raw(address, ask.format(path).encode())), path
        deaf = [raw(address, ask.format("/?token=secret").encode() * 40) for _ in range(3)]
        for _ in range(100):
            if not server.runner.server.connections:
                break
            await asyncio.sleep(0.05)
        assert not server.runner.server.connections and len(deaf) == 3


@live
async def test_malformed_headers_are_bad_requests_in_one_line(duplex, key="A" * 22 + "=="):
    async with serving(duplex) as (address, log, server, client):
        host = address.removeprefix("http://")
        talk = f"GET /talk HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" \
               "Sec-WebSocket-Version: 13\r\nOrigin: {}\r\nSec-WebSocket-Key: {}\r\n\r\n"
        page = "GET / HTTP/1.1\r\n{}\r\n"
        for request in (talk.format("http://[", key), talk.format("http://a]:b", key),
                        talk.format(address, "\xe9" * 24), talk.format(address, "AAAA"),
                        talk.format(address, "A" * 24), talk.format(address, ""), page.format(""),
                        page.format("Host: 127.0.0.1\r\nHost: evil\r\n"), "nonsense\r\n\r\n",
                        page.format("Host: 127.0.0.1\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n")):
            s = raw(address, request.encode("latin-1"))
            answer = await asyncio.to_thread(s.recv, 1000)
            assert answer.startswith(b"HTTP/1.") and answer.split()[1] in (b"400", b"403", b"415"), answer
            if "http://" in request:
                assert answer.split()[1] == b"400", request
        assert all("\n" not in line and len(line) < 300 for line in log) and len(log) >= 7
        assert await talks(await begun(client, address), 0)


@pytest.mark.parametrize("token", ["", " ", "a\nb"])
def test_an_empty_token_is_none(world, token):
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--web", "--token", token)
    assert code == 1 and len(err.strip().splitlines()) == 1 and "--token" in err


def test_a_token_is_quoted_in_the_address(duplex, capsys):
    async def go():
        server = web.Server(duplex, LIMITS, "a&b #?/")
        task = asyncio.ensure_future(web.run(server, "127.0.0.1", 0, False))
        while not (line := capsys.readouterr().out):
            await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as client:
            async with client.get(aiohttp.client.URL(line.split()[4], encoded=True)) as answer:
                assert answer.status == 200
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    asyncio.run(asyncio.wait_for(go(), 60))


@pytest.mark.parametrize("host, token, length", [
    ("127.0.0.1", None, 0), ("127.0.0.1", "random", 16), ("0.0.0.0", None, 16), ("0.0.0.0", "word", 4)])
def test_which_token_the_server_asks_for(duplex, monkeypatch, host, token, length):
    served = []

    async def note(server, *_):
        served.append(server.token)
    monkeypatch.setattr(web, "run", note)
    for _ in range(2):
        web.serve(duplex, host, 0, 1, token)
    assert [len(t or "") for t in served] == [length] * 2
    assert (served[0] == served[1]) == (length < 16)


def test_what_is_logged_cannot_steer_a_terminal(capsys):
    web.log_to_stderr("127.0.0.1 GET '/': 400 Unsupported version: \x1b[2J")
    web.log_to_stderr("é is a letter")
    assert capsys.readouterr().err.splitlines() == [
        "\"127.0.0.1 GET '/': 400 Unsupported version: \\x1b[2J\"", "é is a letter"]


def test_addresses_of_one_household_count_together():
    assert web.network(("2001:db8::1", 5, 0, 0)) == web.network(("2001:db8::ffff", 6, 0, 0))
    assert web.network(("2001:db8:1::1", 5, 0, 0)) != web.network(("2001:db8::1", 6, 0, 0))
    assert web.network(("10.0.0.1", 5)) == "10.0.0.1" != web.network(("10.0.0.2", 5))


def test_an_old_aiohttp_is_refused(monkeypatch):
    import importlib
    monkeypatch.setattr(aiohttp, "__version__", "3.13.5")
    with pytest.raises(ValueError, match="needs aiohttp 3.14.5, not 3.13.5"):
        importlib.reload(web)
    monkeypatch.undo()
