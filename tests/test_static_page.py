"""The page without a server: the exported graph, the page around it, and both in a real browser."""
import asyncio
import base64
import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from soundfile import read as read_sound

from page.export import (FILES, FOLDER, RUNTIME, build, export_step, narrow, page_of, recordings,
                         runtime, token_bytes)
from page.step import ExportedStep, draw
from chat import DuplexModel
from conftest import ROOT, run
from files.atomic import check_folder
from files.audio import write_audio
from kernels.sampling import Sampling, random_bits, reference
from layouts.typed import typed_tokens
from live.packed import unpack
from live.transcript import Transcript
from mimi import FRAME
from streams import K
from toy.voices import Espeak, speak

DRAWN = Sampling(0.8, top_k=40, top_p=0.95, penalty=1.2)
NODE = shutil.which("node")


def talker(world, how=Sampling()):
    """A model that talks, with weights that half precision holds exactly."""
    duplex = DuplexModel.load(str(world / "flm"))
    for module in (duplex.model, duplex.codec):
        for p in module.parameters():
            p.data = p.data.half().float()
    duplex.sampling = [how] * (1 + K)
    return duplex


def noises(frames):
    """(frames, 1, 1, 1920): noise that swells and fades, as 16-bit samples."""
    x = np.random.default_rng(1).normal(size=(frames, FRAME)) * np.sin(np.arange(frames) / 5)[:, None] * 0.1
    return torch.from_numpy((x * 32767).round().clip(-32768, 32767) / 32768).float()[:, None, None]


def uniforms(seed, frame):
    """What the sampler draws in this frame, counted from 0: (1, 1 + K) float64."""
    return torch.tensor([[random_bits(seed, frame + 1, d) * 2.0 ** -53 for d in range(1 + K)]],
                        dtype=torch.float64)


def converse(duplex, frames, seed):
    """(text tokens, speak codes, audio) frame by frame, as chat.py talks."""
    state, texts, codes, audio = duplex.init_state([seed]), [], [], []
    for wav in frames:
        text, said = duplex.step(wav, state)
        texts.append(text.item())
        codes.append(state.speak[0].tolist())
        audio.append(said.flatten())
    return texts, codes, torch.stack(audio)


def same(result, expected):
    (texts, codes, audio), (right_texts, right_codes, right_audio) = result, expected
    assert texts == right_texts and codes == right_codes
    assert (audio - right_audio).abs().max() < 1e-4 < right_audio.abs().max()
    assert len(set(map(tuple, codes))) > 5  # it does not say one thing all the time


@pytest.mark.parametrize("how", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_the_step_without_a_memory_is_the_step_of_chat(world, how):
    duplex, frames = talker(world, how), noises(200)
    step, texts, codes, audio = ExportedStep(duplex), [], [], []
    state = list(step.start.values())
    for t, wav in enumerate(frames):
        text, said, state = step(wav, uniforms(7, t), state)
        texts.append(text.item())
        codes.append(state[list(step.start).index("state.speak")][0].tolist())
        audio.append(said.flatten())
    same((texts, codes, torch.stack(audio)), converse(duplex, frames, 7))


def test_the_sampler_in_floating_point_is_the_one_in_integers():
    rng = torch.Generator().manual_seed(3)
    seed, step = torch.arange(64), torch.arange(64) * 1000
    u = torch.tensor([random_bits(s, t, 2) * 2.0 ** -53 for s, t in zip(seed.tolist(), step.tolist())],
                     dtype=torch.float64)
    tokens = set()
    for how in (Sampling(), Sampling(1.0), Sampling(0.5, top_k=20), Sampling(1.5, top_p=0.9), DRAWN,
                Sampling(1e-3), Sampling(100.0, top_p=1e-6)):
        logits = torch.randn(64, 300, generator=rng) * 4
        logits[0, 5:] = -torch.inf
        logits[1] = torch.nan
        logits[2] = 1.0
        recent = torch.randint(-1, 300, (64, 50), generator=rng)
        expected = reference(logits, how, seed, step, 2, recent)
        assert torch.equal(draw(logits, how, u, recent), expected), how
        assert expected[1] == -1 and expected[0] < 5
        tokens |= {*expected.tolist()}
    assert len(tokens) > 100


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_random_numbers_of_the_worker_are_the_samplers():
    with open(os.path.join(ROOT, "page/worker.js"), encoding="utf-8") as f:
        function = f.read().split("const MASK", 1)[1]
    numbers = [(seed, step, d) for seed in (0, 1, 2 ** 32 - 1) for step in (1, 45_000, 2 ** 40)
               for d in range(9)]
    script = (f"const MASK{function}\nconsole.log(JSON.stringify({json.dumps(numbers)}"
              ".map(n => uniform(...n.map(BigInt)))))")
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [random_bits(*n) * 2.0 ** -53 for n in numbers]


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_what_is_typed_becomes_the_tokens_of_chat(world):
    duplex = DuplexModel.load(str(world / "flm"))
    v = duplex.vocab
    texts = ["up", "what comes  after six", " \u00fcber <wait> 你好 ", "", "\u0065\u0301 x\ty"]
    facts = {"tokens": [token_bytes(duplex.tokenizer, i) for i in range(v.text_size)],
             "wait": v.wait, "asr": v.asr, "answer": v.answer}
    with open(os.path.join(ROOT, "page/worker.js"), encoding="utf-8") as f:
        functions = f.read().split("function tokensOf", 1)[1].split("const MASK", 1)[0]
    script = (f"const facts = {json.dumps(facts)}\nfunction tokensOf{functions}\n"
              f"console.log(JSON.stringify({json.dumps(texts)}.map(tokensOf)))")
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [typed_tokens(text, v, duplex.tokenizer) for text in texts]
    assert json.loads(done.stdout) == expected
    assert len(expected[1]) > 6, "tokens of several letters and of one"


# ------------------------------------------------------------------------------------------------------------
# the graph


@pytest.fixture(scope="module")
def packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra 'page'")


@pytest.fixture(scope="module", params=[Sampling(), DRAWN], ids=["greedy", "drawn"])
def exported(world, packages, request):
    duplex = talker(world, request.param)
    return duplex, *export_step(duplex)


def test_the_graph_is_the_step_of_chat(exported):
    import onnxruntime
    duplex, graph, start = exported
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    assert [i.name for i in session.get_inputs()] == ["wav", "uniforms", *start]
    names = [o.name for o in session.get_outputs()]
    assert names == ["text", "said", *(f"next.{name}" for name in start)]
    state, texts, codes, audio = {name: x.numpy() for name, x in start.items()}, [], [], []
    frames = noises(200)
    for t, wav in enumerate(frames):
        out = dict(zip(names, session.run(None, {"wav": wav.numpy(), "uniforms": uniforms(7, t).numpy(),
                                                 **state})))
        state = {name: out[f"next.{name}"] for name in start}
        texts.append(int(out["text"][0]))
        codes.append(state["state.speak"][0].tolist())
        audio.append(torch.from_numpy(out["said"].flatten()))
    same((texts, codes, torch.stack(audio)), converse(duplex, frames, 7))


def test_narrow_weights_are_small(exported):
    duplex, graph, _ = exported
    numbers = sum(x.numel() for m in (duplex.model, duplex.codec) for x in m.parameters())
    half_size = graph.ByteSize()
    assert 2 * numbers < half_size < 2 * numbers + 400_000  # the graph itself, the codebooks, the filters
    assert not any(x.name.endswith("int8") for x in graph.graph.initializer)
    narrow(graph.graph, int8=True)  # what is narrow already stays
    assert graph.ByteSize() == half_size


# ------------------------------------------------------------------------------------------------------------
# the page


def test_the_page_allows_its_own_scripts_and_nothing_else():
    with open(os.path.join(ROOT, "live/web.html"), encoding="utf-8") as f:
        web = f.read()
    page = page_of(web, {"tokens": ["</script>"], "wait": 1})
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert "unsafe-inline" not in policy and "*" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert len(inline) == 1
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rules[rule]
    facts = re.search(r'type="application/json">(.*?)</script>', page)[1]
    assert json.loads(facts)["tokens"] == ["</script>"]
    assert page.index("local.js") < page.index('"use strict"')
    assert page.count("\n") - web.count("\n") == 4  # one web.html for both


def test_another_runtime_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "runtime.tgz"
    path.write_bytes(b"another one")
    with pytest.raises(ValueError, match="is not onnxruntime-web@.* as pinned here"):
        runtime(str(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="install npm"):
        runtime(str(tmp_path / "none.tgz"))


def test_every_request_of_the_list_is_spoken_if_espeak_is_there(monkeypatch):
    web = "<dt>up</dt><dd>a word</dd><dt>listen, the end</dt>"
    short, long = [read_sound(io.BytesIO(data))[0] for data in recordings(web).values()]
    assert list(recordings(web)) == ["request-0.flac", "request-1.flac"]
    assert np.abs(short).max() > 0.05 and len(long) > len(short) + 0.6 * 24_000  # and a pause
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert recordings(web) == {}


def test_only_a_page_is_replaced(tmp_path):
    page = tmp_path / "page"
    page.mkdir()
    for name in (*FILES, "request-0.flac"):
        (page / name).touch()
    assert check_folder(str(page), FOLDER, replace=True)[0] == str(page)
    (page / "index.htmlx").touch()
    with pytest.raises(ValueError, match="is not ours"):
        check_folder(str(page), FOLDER, replace=True)


def test_errors_of_the_command(world, tmp_path):
    code, _, err = run("page.export", tmp_path / "none", tmp_path / "page")
    assert code == 1 and err.startswith("error: ") and "no such folder" in err
    (tmp_path / "page").mkdir()
    (tmp_path / "page/thesis.txt").write_text("years of work")
    code, _, err = run("page.export", world / "flm", tmp_path / "page", "--runtime", tmp_path / "none.tgz")
    assert code == 1 and "thesis.txt in it is not ours" in err
    code, _, err = run("page.export", world / "flm", tmp_path / "other", "--temperature", -1)
    assert code == 1 and "temperature" in err


# ------------------------------------------------------------------------------------------------------------
# in a browser

@pytest.fixture(scope="module")
def archive(packages, tmp_path_factory):
    """The path of ONNX Runtime Web."""
    pytest.importorskip("aiohttp", reason="needs the extra 'web'")
    path = os.path.join(ROOT, "out", f"{RUNTIME.replace('@', '-')}.tgz")
    if not os.path.exists(path):
        path = str(tmp_path_factory.mktemp("npm") / "runtime.tgz")
    try:
        runtime(path)
    except ValueError as e:
        pytest.skip(f"needs ONNX Runtime Web ({e})")
    return path


@pytest.fixture(scope="module")
def served(world, archive, tmp_path_factory):
    """(the folder of a page, its model)"""
    folder, duplex = str(tmp_path_factory.mktemp("page") / "page"), talker(world, DRAWN)
    build(duplex, folder, archive, "float16", ["typed:typed"])
    return folder, duplex


@contextlib.contextmanager
def serving(folder):
    """A static host: (address, paths asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(params=["chromium", "firefox"])
def start(request):
    """What starts a browser."""
    import browser
    if getattr(browser, request.param.upper()) is None:
        pytest.skip(f"needs {request.param} (Debian: apt install chromium firefox-esr)")
    return getattr(browser, request.param)


@contextlib.asynccontextmanager
async def opened(folder, profile, start=None, **kwargs):
    """(a tab with the page, its address, paths asked for)"""
    from browser import chromium
    with serving(folder) as (address, asked):
        async with (start or chromium)(str(profile), **kwargs) as browser:
            tab = await browser.open(address)
            await tab.until("typeof talk !== 'undefined' && document.readyState === 'complete'")
            yield tab, address, asked


@pytest.mark.slow
def test_a_request_into_the_microphone_is_answered_as_by_chat(archive, tmp_path):
    """The weights of the repository in float32, and a fake microphone that says a request again and again.
    chat.py hears what reached the model."""
    from browser import CHROMIUM, chromium
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    unpack(os.path.join(ROOT, "weights/talk.safetensors"), str(tmp_path / "talk"))
    duplex = DuplexModel.load(str(tmp_path / "talk"))
    duplex.sampling = [Sampling()] * (1 + K)
    build(duplex, str(tmp_path / "page"), archive, "float32")
    second = torch.zeros(24_000)
    request = torch.from_numpy(speak(Espeak(), ["what comes after six"], [], "en-us+f3")[0])
    write_audio(str(tmp_path / "user.wav"), torch.cat([second, request, *[second] * 4]))

    async def talk():
        async with opened(str(tmp_path / "page"), tmp_path / "profile", chromium,
                          microphone=tmp_path / "user.wav") as (tab, *_):
            await tab.value(TAP)
            await tab.value("$('talk').click()")
            await tab.until("/seven/.test($('monologue').textContent)", 240)
            frames = await tab.value("tapped.said.length")
            await tab.until(f"tapped.said.length > {frames + 15}", 60)  # it says the answer, too
            await tab.value("$('talk').click()")
            pieces = await tab.value("JSON.stringify(record.pieces.map(p => [p.time, p.text]))")
            heard, said = [torch.tensor(json.loads(await tab.value(f"JSON.stringify(tapped.{x}.flat())")))
                           for x in ("heard", "said")]
            return [tuple(p) for p in json.loads(pieces)], heard[:len(said)], said
    pieces, heard, said = asyncio.run(talk())
    texts, _, right = converse(duplex, (heard / 32768).view(-1, 1, 1, FRAME), 0)
    transcript = Transcript(duplex)
    for t, token in enumerate(texts):
        transcript.add(t, token)
    assert [p["text"].strip() for p in transcript.pieces] == [text.strip() for _, text in pieces]
    assert "seven" in "".join(text for _, text in pieces)
    assert right.abs().max() > 0.05
    assert torch.corrcoef(torch.stack([said / 32767, right.flatten()]))[0, 1] > 0.999


TAP = """{ // what reaches the model, and what it says, frame by frame
    globalThis.tapped = { heard: [], said: [] }
    const { send, receive } = LocalSocket.prototype
    LocalSocket.prototype.send = function (data) {
        if (data instanceof DataView) tapped.heard.push([...new Int16Array(data.buffer.slice(4))])
        send.call(this, data)
    }
    LocalSocket.prototype.receive = function (data) {
        if (data instanceof ArrayBuffer) tapped.said.push([...new Int16Array(data.slice(4))])
        receive.call(this, data)
    }
}"""

TALK = """{
    const bytes = Uint8Array.from(atob("AUDIO"), c => c.charCodeAt(0)), N = bytes.length / 2 / FRAME
    globalThis.result = { pieces: [], said: [], failed: "" }
    LocalSocket.seed = 7
    const socket = new LocalSocket()
    let n = 0
    const next = () => {
        const message = new DataView(new ArrayBuffer(4 + 2 * FRAME))
        message.setUint32(0, n, true)
        new Uint8Array(message.buffer).set(bytes.subarray(2 * FRAME * n, 2 * FRAME * ++n), 4)
        socket.send(message)
    }
    socket.onclose = ({ reason }) => { result.failed = reason; result.done = true }
    socket.onmessage = ({ data }) => {
        if (data instanceof ArrayBuffer) {
            result.said.push(...new Int16Array(data, 4))
            n < N ? next() : result.done = true
        } else if (JSON.parse(data).type === "begin") {
            if (TYPED) socket.send(JSON.stringify({ type: "type", text: TYPED }))
            next()
        } else result.pieces.push(JSON.parse(data))
    }
}"""


async def talk_through(tab, frames, seconds=300, typed=""):
    """The same recording through the engine of the page, at its own speed, after something typed: (pieces of
    text, audio)."""
    samples = (frames.flatten() * 32768).short().numpy().tobytes()
    await tab.value(TALK.replace("TYPED", json.dumps(typed))
                    .replace("AUDIO", base64.b64encode(samples).decode()))
    await tab.until("result.done", seconds)
    result = json.loads(await tab.value("JSON.stringify(result)"))
    assert not result["failed"], result["failed"]
    return [(p["time"], p["text"]) for p in result["pieces"]], np.array(result["said"]) / 32767


@pytest.mark.slow
def test_a_browser_says_what_chat_says(served, tmp_path, start):
    folder, duplex = served
    frames = noises(60)
    transcript = Transcript(duplex)
    texts, _, right = converse(duplex, frames, 7)
    for t, token in enumerate(texts):
        transcript.add(t, token)

    async def talk():
        async with opened(folder, tmp_path / "profile", start) as (tab, *_):
            pieces, said = await talk_through(tab, frames)
            assert pieces == [(p["time"], p["text"]) for p in transcript.pieces] and len(pieces) > 3
            assert np.abs(said - right.flatten().numpy()).max() < 2e-4
            assert np.corrcoef(said, right.flatten().numpy())[0, 1] > 0.999
            again, _ = await talk_through(tab, frames)
            assert again == pieces
            assert await tab.value("!$('typed').hidden && $('role').hidden && $('voice').hidden")
            tokens, other = typed_tokens("up down", duplex.vocab, duplex.tokenizer), Transcript(duplex)
            texts, right_ = duplex.converse(frames.flatten()[None], 7, typed=tokens)
            for t, token in enumerate(texts[0].tolist()):
                other.add(t, token)
            typed, said = await talk_through(tab, frames, typed="up down")
            assert typed == [(p["time"], p["text"]) for p in other.pieces] != pieces
            assert np.abs(said[:-FRAME] - right_[0, FRAME:].numpy()).max() < 2e-4
    asyncio.run(talk())


@pytest.mark.slow
def test_a_recording_is_played_without_a_microphone(served, tmp_path, start):
    folder, _ = served
    write_audio(str(tmp_path / "user.wav"), torch.sin(torch.arange(5 * 24_000) / 20) * 0.3)
    sound = base64.b64encode((tmp_path / "user.wav").read_bytes()).decode()
    play = f"begin(new File([Uint8Array.from(atob('{sound}'), c => c.charCodeAt(0))], 'user.wav'))"
    loud = "record.said.length > 20 && record.heard.some(f => rms(f) > 3000)"

    async def talk():
        async with opened(folder, tmp_path / "profile", start, allowed=False) as (tab, address, asked):
            if not await tab.value("""Promise.race([new AudioContext().resume().then(() => true),
                                                    new Promise(no => setTimeout(no, 20000, false))])"""):
                pytest.skip("Firefox needs a sound server (Debian: apt install pulseaudio)")
            assert not any("model.bin" in path for path in asked)  # nothing large before the first Talk
            await tab.value("$('talk').click()")
            message = await tab.until(
                "!talk && /refused/.test($('floor').textContent) && $('floor').textContent")
            assert message.endswith("Or play a file, or type.")
            await tab.value("$('typed').value = 'up'; $('typed').onkeydown({ key: 'Enter' })")
            await tab.until("talk && $('typed').value === '' && record.said.length > 5", 120)
            await tab.value("$('card').querySelector('button').click()")  # the first request of the list
            await tab.until(f"talk?.recording && {loud}", 120)
            await tab.value("end('')")
            await tab.value(play)
            await tab.until(loud, 120)
            await tab.value("$('restart').click()")
            await tab.until(f"record.said.length < 20 || {loud}", 60)
            await tab.until("navigator.serviceWorker.controller && true", 60)
            await tab.value("$('talk').click()")  # stop
            assert await tab.value("begin(new File(['nothing'], 'a.wav'))") is None
            assert "no audio" in await tab.until("!talk && $('floor').textContent")
            paths = {path.split("?")[0] for path in asked}
            assert paths <= {"/", *(f"/{name}" for name in os.listdir(folder))} and "/model.bin" in paths
    asyncio.run(talk())


@pytest.mark.slow
def test_once_loaded_it_works_without_a_network(served, tmp_path, start):
    frames, ready = noises(5), "typeof talk !== 'undefined' && document.readyState === 'complete'"

    async def talk():
        async with start(str(tmp_path / "profile")) as browser:
            with serving(served[0]) as (address, _):
                tab = await browser.open(address)
                await tab.until(ready)
                first = await talk_through(tab, frames)
                await tab.until("navigator.serviceWorker.controller && true", 60)
            await tab.value("location.reload()")
            await tab.until(f"typeof result === 'undefined' && {ready}")
            again = await talk_through(tab, frames)
            assert again[0] == first[0] and np.array_equal(again[1], first[1])
    asyncio.run(talk())


@pytest.mark.slow
def test_no_request_leaves_the_page(served, tmp_path, start):
    """Neither from the page nor from a worker that it starts, even if a script in them tried."""
    folder, _ = served

    async def talk():
        with serving(str(tmp_path)) as (elsewhere, asked):
            async with opened(folder, tmp_path / "profile", start) as (tab, *_):
                attempt = f"fetch('{elsewhere}', {{ mode: 'no-cors' }}).then(() => 'sent', () => 'blocked')"
                assert await tab.value(attempt) == "blocked"
                assert await tab.value(f"""new Promise(done => {{
                    const code = new Blob([`{attempt}.then(postMessage)`], {{ type: "text/javascript" }})
                    const worker = new Worker(URL.createObjectURL(code), {{ type: "module" }})
                    worker.onmessage = ({{ data }}) => done(data)
                }})""") == "blocked"
                assert await tab.value("""new Promise(done => {
                    const script = document.createElement("script")
                    script.textContent = "globalThis.injected = true"
                    document.body.append(script)
                    done(Boolean(globalThis.injected))
                })""") is False
            assert asked == []
    asyncio.run(talk())


FAULTY = {  # lines before those of worker.js
    "no wasm": "delete globalThis.WebAssembly",
    # what the runtime gets when it asks for its first memory, and when it asks for more
    "no memory": "WebAssembly.Memory = function () { throw new RangeError('could not allocate memory') }",
    "memory refused": "WebAssembly.Memory.prototype.grow = () => { throw new RangeError('failed to grow') }"}


@pytest.mark.slow
@pytest.mark.parametrize("fault, message", [
    ("cut", "model.bin is cut off or damaged"), ("damaged", "model.bin is cut off or damaged"),
    ("missing", "the server answers 404"), ("no runtime", "The model does not run in this browser"),
    ("no wasm", "Here is no WebAssembly"), ("no memory", "too little free memory"),
    ("memory refused", "too little free memory")])
def test_faults_are_sentences(served, tmp_path, start, fault, message):
    folder = shutil.copytree(served[0], tmp_path / "page")
    model = folder / "model.bin"
    data = bytearray(model.read_bytes())
    if fault == "cut":
        model.write_bytes(data[:len(data) // 2])
    elif fault == "damaged":
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
    elif fault == "missing":
        model.unlink()
    elif fault == "no runtime":
        (folder / "ort.wasm.bundle.min.mjs").write_text("nonsense")
    elif fault in FAULTY:
        worker = folder / "worker.js"
        worker.write_text(f"{FAULTY[fault]}\n{worker.read_text(encoding='utf-8')}", "utf-8")

    async def talk():
        async with opened(str(folder), tmp_path / "profile", start) as (tab, *_):
            await tab.value("$('talk').click()")
            said = await tab.until("!talk && !$('talk').disabled && $('floor').textContent", 60)
            assert message in said and said.endswith((".", ")"))
    asyncio.run(talk())
