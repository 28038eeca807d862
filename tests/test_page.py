"""The page in a real browser, a held-out request for its microphone.

With an untrained model this sees that audio and tokens flow. A trained one's answers are checked too:

    TALK_TO=out/tiny TALK_OF=data/toy python -m pytest -m slow tests/test_page.py
"""
import asyncio
import base64
import contextlib
import json
import os
import shutil

import pytest
import soundfile
import torch

from chat import DuplexModel
from evals.conversations import written
from files.audio import read_audio, write_audio
from files.manifest import read_manifest
from layouts.prompts import make_prompt
from layouts.typed import typed_tokens
from live.recordings import make_prompts, save_recording
from toy.voices import Espeak, speak
from evals.turns import words_of

pytest.importorskip("aiohttp", reason="needs the extra 'web'")
from live import web  # noqa: E402
from browser import CHROMIUM, chromium  # noqa: E402

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")]
TRAINED = os.environ.get("TALK_TO")


def request_of(world, path):
    """A held-out request between silences as a WAV file, longer than the test: (request, right answer).
    With a trained model it is the first one that it answers right from a file, to test the page alone."""
    items = read_manifest(os.path.join(os.environ.get("TALK_OF", str(world / "toy")), "manifest.jsonl"))
    second = torch.zeros(24_000)
    for item in (d for d in items if d["split"] == "seen"
                 and d["kind"] in ("next", "opposite", "count", "repeat")):
        audio, (asked, right) = read_audio(item["turns"][0]["path"]), [turn["text"] for turn in item["turns"]]
        audio = torch.cat([second, second, audio, *[second] * 30])
        if not TRAINED or answer(audio[:10 * 24_000]) == right.split():
            write_audio(str(path), audio)
            return asked, right


def answer(audio):
    duplex = DuplexModel.load(TRAINED)
    return words_of(written(duplex, duplex.converse(audio[None])[0][0]))


async def open_page(browser, address):
    tab = await browser.open(address)
    await tab.until("typeof talk !== 'undefined' && document.readyState === 'complete'")
    return tab


@contextlib.asynccontextmanager
async def serving(world, port=0, lessons_of=None, layouts=("prompts:prompted", "typed:typed")):
    """(server, address of the page). lessons_of: the folder of a model that can be taught"""
    folder = lessons_of or TRAINED or str(world / "flm")
    server = web.Server(DuplexModel.load(folder), web.Limits(sessions=2), checkpoint=lessons_of,
                        layouts=layouts)
    port = await server.start("127.0.0.1", port)
    try:
        yield server, f"http://127.0.0.1:{port}/"
    finally:
        await server.stop()


def test_a_request_is_heard_and_answered_on_two_pages_at_once_and_after_a_reload(world, tmp_path):
    asked, right = request_of(world, tmp_path / "user.wav")

    async def talk():
        async with (serving(world) as (server, address),
                    chromium(str(tmp_path / "profile"), tmp_path / "user.wav") as browser):
            first = await open_page(browser, address)
            assert await first.value("document.activeElement.id") == "talk"
            await first.press("Enter", 13)  # by the keyboard alone
            await first.until("record.said.length > 20")
            second = await open_page(browser, address)
            await second.value("$('talk').click()")
            await second.until("record.said.length > 20")
            third = await open_page(browser, address)
            await third.value("$('talk').click()")
            assert "full" in await third.until(
                "/full/.test($('floor').textContent) && $('floor').textContent")
            await first.until("record.pieces.length && record.said.length > 120", 60)
            heard, said, trip, shown = json.loads(await first.value("""JSON.stringify(
                [record.heard, record.said].map(frames => Math.max(
                ...frames.map(f => Math.sqrt(f.reduce((a, x) => a + x * x, 0) / FRAME)))).concat(
                record.trip, record.pieces.map(piece => piece.text).join("")))"""))
            print(f"asked {asked!r}, right {right!r}, shown {shown!r}; round trip {trip:.0f} ms; "
                  f"loudest frames {heard:.0f}, {said:.0f}")
            assert heard > 300 and said > 30 and 0 < trip < 5000 and shown
            if TRAINED:
                assert shown.split() == right.split()
            size, left, right_ = await first.value("""(() => {
                const view = new DataView(wav(record.heard, record.said)), at = 44 + 4 * 90 * FRAME
                return [view.byteLength, view.getInt16(at, true) === record.heard[90][0],
                        view.getInt16(at + 2, true) === record.said[90][0]]
            })()""")
            assert size % (4 * 1920) == 44 and left and right_
            await first.value("$('restart').click()")
            await first.until("record.said.length > 5 && record.said.length < 60")
            await first.value("$('mute').click()")
            await first.until("record.heard.length > 20 && record.heard.at(-1).every(x => x === 0)")
            await first.call("Page.reload")
            await first.until("typeof talk !== 'undefined' && talk === null && record.heard.length === 0")
            await first.value("$('talk').click()")
            await first.until("record.said.length > 20")
            assert len(server.clients) == 2
    asyncio.run(talk())


def test_fields_are_shown_for_what_the_model_was_trained_on(world, tmp_path):
    async def look():
        for layouts, shown in (("tts",), []), (("typed:typed_counts",), ["typed"]), \
                (("prompts:prompted", "tts"), ["role", "voice"]):
            async with (serving(world, layouts=layouts) as (_, address),
                        chromium(str(tmp_path / "_".join(shown))) as browser):
                tab = await open_page(browser, address)
                assert await tab.value("""["typed", "role", "voice"].filter(
                    id => $(id).getClientRects().length)""") == shown
    asyncio.run(look())


def test_a_voice_reaches_the_engine(world, tmp_path):
    """The page reads any sound file; what it sends begins the conversation, and a short one is refused."""
    for seconds in (4, 0.2):
        sound = torch.stack([torch.randn(int(44_100 * seconds)), torch.zeros(int(44_100 * seconds))]) * 0.1
        soundfile.write(tmp_path / f"{seconds}.wav", sound.T.numpy(), 44_100)
    sounds = {seconds: base64.b64encode((tmp_path / f"{seconds}.wav").read_bytes()).decode()
              for seconds in (4, 0.2)}
    choose = "chooseVoice(new File([Uint8Array.from(atob('{}'), c => c.charCodeAt(0))], 'anna.wav'))"

    async def talk():
        async with serving(world) as (server, address), chromium(str(tmp_path / "profile")) as browser:
            tab = await open_page(browser, address)
            await tab.value(choose.format(sounds[0.2]))
            assert "half a second" in await tab.value("$('floor').textContent")
            await tab.value("chooseVoice(new File(['nothing'], 'a.wav'))")
            assert "no audio" in await tab.value("$('floor').textContent")
            assert await tab.value("voice === null && $('voice').textContent") == "Voice"
            await tab.value(choose.format(sounds[4]))
            assert await tab.value("voice.length === 3 * RATE && $('voice').textContent") == "Voice: anna.wav"
            await tab.value("$('talk').click()")
            await tab.until("record.said.length > 5")
            session, = server.clients
            assert session.prompt.shape == make_prompt(server.duplex, "", torch.zeros(3 * 24_000)).shape
            await tab.value("$('voice').click(); $('restart').click()")
            await tab.until("voice === null && record.said.length < 20")
            for _ in range(100):
                if [s.prompt for s in server.clients] == [None]:
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("it still has a prompt")
    asyncio.run(talk())


def test_a_role_and_typed_text_reach_the_engine(world, tmp_path):
    """The page starts again in the role; what is typed is read between <asr> and <answer>."""
    async def talk():
        async with serving(world) as (server, address), chromium(str(tmp_path / "profile")) as browser:
            tab = await open_page(browser, address)
            await tab.value("$('role').value = 'say it twice'; $('talk').click()")
            await tab.until("record.said.length > 5 && !$('talk').disabled")
            session, = server.clients
            assert session.prompt.shape == make_prompt(server.duplex, "say it twice").shape
            taken, take = [], session.type
            session.type = lambda tokens: taken.append(tokens) or take(tokens)
            await tab.value("$('typed').value = 'up down'; $('typed').focus()")
            await tab.press("Enter", 13)
            await tab.until("$('typed').value === ''")
            for _ in range(300):  # until the engine has read all of it
                if taken and not session.typed:
                    break
                await asyncio.sleep(0.1)
            assert taken == [typed_tokens("up down", server.duplex.vocab, server.duplex.tokenizer)]
            assert not session.typed
    asyncio.run(talk())


def test_a_refused_microphone_has_a_clear_message(world, tmp_path):
    async def talk():
        async with (serving(world) as (server, address),
                    chromium(str(tmp_path / "profile"), allowed=False) as browser):
            tab = await open_page(browser, address)
            await tab.value("$('talk').click()")
            assert await tab.until("$('floor').textContent.startsWith('The microphone was refused')")
            assert not server.clients
    asyncio.run(talk())


def test_a_server_that_ends_has_a_clear_message_and_the_next_one_answers(world, tmp_path):
    async def talk():
        async with chromium(str(tmp_path / "profile")) as browser:
            async with serving(world) as (_, address):
                tab = await open_page(browser, address)
                await tab.value("$('talk').click()")
                await tab.until("record.said.length > 5")
            assert "the server ends" in await tab.until("!talk && $('floor').textContent")
            async with serving(world, int(address[:-1].rsplit(":", 1)[1])):
                await tab.value("$('talk').click()")
                await tab.until("talk && record.said.length > 5 && record.said.length < 100")
    asyncio.run(talk())


@contextlib.asynccontextmanager
async def lesson_page(folder, tmp_path, user=None, **options):
    """A server of the model in `folder`, and its page in a browser with the recording `user` as microphone:
    (server, tab)."""
    async with serving(None, lessons_of=folder) as (server, address):
        async with chromium(str(tmp_path / "profile"), user, **options) as browser:
            yield server, await open_page(browser, address)


def test_it_is_taught_a_voice_and_goes_on_with_either_model(world, tmp_path):
    """With a fake microphone that repeats one sentence, and a training of a few steps."""
    prompts = make_prompts()
    speech = torch.from_numpy(speak(Espeak(), [prompts[0].text], [], "en-us+f1")[0])
    second = torch.zeros(24_000)
    write_audio(str(tmp_path / "user.wav"), torch.cat([second, speech, second, second]))
    shutil.copytree(world / "flm", tmp_path / "flm")

    async def talk():
        async with lesson_page(str(tmp_path / "flm"), tmp_path, tmp_path / "user.wav") as (server, tab):
            server.lessons.extra = ("--steps", "3", "--device", "cpu")
            await tab.until("!$('teach').hidden && !$('card').hidden")
            await tab.value("$('teach').click()")
            await tab.until("lesson && $('prompt').textContent === lesson.prompts[0]")
            assert await tab.value("$('learn').disabled")
            await tab.value("$('record').click()")
            await tab.until("lesson.recorded.length >= 8", 120)
            await tab.value("$('record').click()")
            await tab.until("!recording && !$('learn').disabled")
            await tab.value("$('learn').click()")
            await tab.until("lesson.learning && !$('learning').hidden")
            await tab.call("Page.reload")  # closed in the middle of it
            await tab.until("typeof talk !== 'undefined' && !$('teach').hidden")
            await tab.value("$('teach').click()")
            await tab.until("lesson && lesson.has_new && !lesson.learning", 240)
            assert await tab.value("lesson.which") == "new"
            assert server.duplex is server.lessons.models["new"]
            assert "learned your voice" in await tab.until("$('verdict').textContent")
            await tab.value("$('swap').click()")
            await tab.until("lesson.which === 'old'")
            assert server.duplex is server.lessons.models["old"]
            await tab.value("$('close').click()")
            await tab.value("$('talk').click()")
            await tab.until("record.said.length > 20")
    asyncio.run(talk())


def test_a_lesson_is_continued_after_a_failure_and_a_prompt_is_recorded_again(world, tmp_path):
    """Eight recordings are there from before; one is made, and once more; the server ends in the middle."""
    prompts = make_prompts()
    says = lambda n: torch.from_numpy(speak(Espeak(), [prompts[n].text], [], "en-us+f1")[0])
    second = torch.zeros(24_000)
    for n in range(8):
        save_recording(str(tmp_path / "voice"), n, torch.cat([second / 9, says(n)]))
    write_audio(str(tmp_path / "user.wav"), torch.cat([second, says(8), second, second]))
    shutil.copytree(world / "flm", tmp_path / "flm")
    ninth = tmp_path / "voice/09.wav"

    async def talk():
        async with lesson_page(str(tmp_path / "flm"), tmp_path, tmp_path / "user.wav") as (server, tab):
            await tab.value("$('teach').click()")
            await tab.until("lesson?.recorded.length === 8 && at === 8 && $('again').disabled")
            server.lessons.extra = ("--device", "abacus")
            await tab.value("$('learn').click()")
            assert "It could not learn: --device abacus" in await tab.until(
                "!lesson.learning && $('verdict').textContent", 60)
            assert await tab.value("lesson.which === 'old' && $('swap').hidden")
            await tab.value("$('record').click(); $('record').click()")  # stopped before it is allowed
            await tab.until("!recording && $('record').textContent === 'Record'")
            await tab.value("$('record').click()")
            await tab.until("$('verdict').textContent === 'Read it aloud.'")
            assert "dB. The next one." in await tab.until(
                "lesson.recorded.length === 9 && $('verdict').textContent", 30)
            first = ninth.stat().st_mtime_ns
            await tab.value("$('again').click()")
            assert await tab.value("at") == 8
            await tab.until("at === 9", 30)
            assert ninth.stat().st_mtime_ns > first and len(server.lessons.status()["recorded"]) == 9
            await tab.call("Page.reload")  # in the middle of recording
            await tab.until("typeof talk !== 'undefined' && !$('teach').hidden")
            await tab.value("$('teach').click()")
            await tab.until("lesson?.recorded.length >= 9")
            await tab.until("$('prompt').textContent === lesson.prompts[at]")
            server.lessons.extra = ("--minutes", "5", "--device", "cpu")
            await tab.value("$('learn').click()")
            await tab.until("lesson.learning && $('count').textContent.startsWith('It learns')")
            await server.stop()
            assert await tab.until("$('verdict').textContent === 'The connection to the server is lost.'")
            assert sorted(os.listdir(tmp_path)) == ["flm", "profile", "user.wav", "voice"]
    asyncio.run(talk())


def test_a_lesson_without_a_microphone_or_a_server_has_a_clear_message(world, tmp_path):
    async def talk():
        async with lesson_page(str(world / "flm"), tmp_path, allowed=False) as (server, tab):
            await tab.value("$('teach').click()")
            await tab.until("lesson && $('lesson').open")
            await tab.value("$('record').click()")
            assert await tab.until("$('verdict').textContent.startsWith('The microphone was refused')")
            await server.stop()
            await tab.value("$('learn').disabled = false; $('learn').click()")
            assert await tab.until("$('verdict').textContent === 'The connection to the server is lost.'")
    asyncio.run(talk())
