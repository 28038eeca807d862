"""How long a frame takes in the page without a server, and how much memory, in a headless Chromium:

    python -m page.export out/talk out/page
    taskset -c 0 python tests/bench_page.py out/page [--seconds 120] [--input user.wav]

With --input the recording is played again and again; otherwise the page hears noise.
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
from files.audio import read_audio  # noqa: E402
from test_static_page import opened  # noqa: E402

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


def memory(profile):
    """Resident memory in MB of the browser's processes for pages, by their command lines."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as f, open(f"/proc/{pid}/statm") as g:
                if "--type=renderer" in (line := f.read()) and profile in line:
                    total += int(g.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        except OSError:
            pass
    return total


async def bench(folder, seconds, wav):
    frames = int(seconds * 12.5)
    samples = base64.b64encode((wav[:len(wav) // 1920 * 1920] * 32767).short().numpy().tobytes()).decode()
    with tempfile.TemporaryDirectory() as profile:
        async with opened(folder, profile) as (tab, *_):
            await tab.value(BENCH.replace("AUDIO", samples).replace("FRAMES", str(frames)))
            await tab.until("times.length > 50", 300)
            print(f"loaded after {await tab.value('loaded') / 1000:.1f} s; {memory(profile):.0f} MB")
            await tab.until(f"times.length >= {frames}", 10 * seconds + 60)
            print(f"{memory(profile):.0f} MB at the end")
            times = torch.tensor(json.loads(await tab.value("JSON.stringify(times)")))[10:]
    print(f"{len(times)} frames: median {times.median():.1f} ms, 99th percentile {times.quantile(0.99):.1f} ms, "
          f"most {times.max():.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that page.export wrote")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--input", help="an audio file")
    args = parser.parse_args()
    asyncio.run(bench(args.folder, args.seconds, read_audio(args.input) if args.input
                      else torch.randn(20 * 24_000).clamp(-9, 9) * 0.05))
