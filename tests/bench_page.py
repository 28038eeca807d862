"""How long a frame takes in the page without a server, and how much memory, in a headless Chromium:

    python -m page.export out/talk out/page
    taskset -c 0 python tests/bench_page.py out/page [--seconds 120] [--input user.wav]
    python tests/bench_page.py out/page --same out/talk --items 1

With --input the recording is played again and again; otherwise the page hears noise. With --same, the page
and the checkpoint that it was made of hear eval.py's scenarios (pauses, interruptions, backchannels): how
much of what they write and say is equal, and the measures of both.
"""
import argparse
import asyncio
import base64
import json
import os
import sys
import tempfile

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from chat import DuplexModel  # noqa: E402
from evals.conversations import written  # noqa: E402
from evals.turns import Reply, ScenarioMaker, report_turns, run_scenarios, score_all, speech  # noqa: E402
from files.audio import read_audio  # noqa: E402
from mimi import FRAME  # noqa: E402
from test_static_page import opened, talk_through  # noqa: E402

BENCH = """{
    const bytes = Uint8Array.from(atob("AUDIO"), c => c.charCodeAt(0)), N = bytes.length / 2 / FRAME
    globalThis.times = []
    const begun = performance.now(), socket = new LocalSocket()
    let n = 0, at
    const next = () => {
        const message = new DataView(new ArrayBuffer(4 + 2 * FRAME)), k = n++ % N
        new Uint8Array(message.buffer).set(bytes.subarray(2 * FRAME * k, 2 * FRAME * (k + 1)), 4)
        at = performance.now()
        socket.send(message)
    }
    socket.onclose = ({ reason }) => { throw Error(reason) }
    socket.onmessage = ({ data }) => {
        if (typeof data === "string") {
            if (JSON.parse(data).type === "begin") { globalThis.loaded = performance.now() - begun; next() }
            return
        }
        times.push(performance.now() - at)
        if (times.length < FRAMES) setTimeout(next, Math.max(0, 80 - times.at(-1)))
    }
}"""


def renderers(profile):
    """(resident memory in MB, seconds of processor time) of the browser's processes for pages."""
    megabytes = ticks = 0
    for process in (f"/proc/{pid}" for pid in filter(str.isdigit, os.listdir("/proc"))):
        try:
            line, pages, times = (open(f"{process}/{name}").read() for name in ("cmdline", "statm", "stat"))
        except OSError:
            continue  # it has ended
        if "--type=renderer" in line and profile in line:
            megabytes += int(pages.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            ticks += sum(map(int, times.rsplit(")")[1].split()[11:13]))
    return megabytes, ticks / os.sysconf("SC_CLK_TCK")


async def bench(folder, seconds, wav):
    frames = int(seconds * 12.5)
    samples = base64.b64encode((wav[:len(wav) // FRAME * FRAME] * 32767).short().numpy().tobytes()).decode()
    with tempfile.TemporaryDirectory() as profile:
        async with opened(folder, profile) as (tab, *_):
            await tab.value(BENCH.replace("AUDIO", samples).replace("FRAMES", str(frames)))
            await tab.until("times.length > 50", 300)
            before, (begin, used) = await tab.value("times.length"), renderers(profile)
            print(f"loaded after {await tab.value('loaded') / 1000:.1f} s; {begin:.0f} MB")
            await tab.until(f"times.length >= {frames}", 10 * seconds + 60)
            end, used = renderers(profile)[0], renderers(profile)[1] - used
            each = 1000 * used / (frames - before)
            print(f"{end:.0f} MB at the end; {each:.1f} ms of a processor for each frame")
            times = torch.tensor(json.loads(await tab.value("JSON.stringify(times)")))[10:]
    print(f"{len(times)} frames: median {times.median():.1f} ms, 99th percentile {times.quantile(0.99):.1f}, "
          f"most {times.max():.1f}")


async def same(folder, checkpoint, items):
    duplex = DuplexModel.load(checkpoint)
    dialogues = [{"split": "seen", "lang": "en", "turns": [{"role": "user", "voice": v}]}
                 for v in ("en-us+f1", "en-us+m3", "en-us+f3")]
    heard, pages, chats, least = [], [], [], 1.0
    def by_chat(groups, _):
        return [[reply(item) for item in items] for items in groups]

    def reply(item):
        item.audio = (item.audio * 32768).round().clamp(-32768, 32767) / 32768  # as it reaches the page
        text, said = duplex.converse(item.audio[None])
        heard.append((item, said[0]))
        return Reply(speech(said[0]), written(duplex, text[0]))
    conversations = run_scenarios(by_chat, ScenarioMaker(dialogues, None, 1), items)
    with tempfile.TemporaryDirectory() as profile:
        async with opened(folder, profile) as (tab, *_):
            for item, reply in conversations:
                right = next(said for other, said in heard if other is item)
                frames = torch.nn.functional.pad(item.audio, (0, -len(item.audio) % FRAME))
                pieces, said = await talk_through(tab, frames.view(-1, 1, 1, FRAME), 600)
                said = torch.cat([torch.zeros(FRAME), torch.from_numpy(said).float()])[:len(right)]
                correlation = torch.corrcoef(torch.stack([said, right]))[0, 1].item()
                least = min(least, correlation)
                pages.append((item, Reply(speech(said), pieces)))
                chats.append((item, reply))
                print(f"{item.name}: text {'equal' if pieces == reply.written else 'differs'}, "
                      f"correlation of the audio {correlation:.6f}", flush=True)
    scores = [score_all(side) for side in (chats, pages)]
    if scores[0] != scores[1]:
        report_turns(scores[0], "chat.py")
    report_turns(scores[1], "page")
    equal = sum(a[1].written == b[1].written for a, b in zip(chats, pages))
    print(f"{equal} of {len(chats)} monologues equal, correlation at least {least:.6f}; "
          f"measures {'equal' if scores[0] == scores[1] else 'differ'}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", help="that page.export wrote")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--input", help="an audio file")
    parser.add_argument("--same", help="the checkpoint that the page was made of")
    parser.add_argument("--items", type=int, default=1, help="of each scenario, for --same")
    args = parser.parse_args()
    if args.same:
        asyncio.run(same(args.folder, args.same, args.items))
    else:
        wav = read_audio(args.input) if args.input else torch.randn(20 * 24_000).clamp(-9, 9) * 0.05
        asyncio.run(bench(args.folder, args.seconds, wav))
