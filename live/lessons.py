"""The page's lessons: it shows prompts, records them, has the model fine-tuned on them (teaching/teach.py, in
a process of its own), and lets one go on with the new model or the old one.

    POST /lesson                    -> {"prompts", "recorded", "state", "message", "passed", "left", ...}
    POST /lesson/recording?number=3    samples, 16 bits at 24 kHz -> {"problem": a sentence or null, "level"}
    POST /lesson/teach | discard       start to learn; delete the recordings
    POST /lesson/model?which=new       or old

Everything stays on this machine: recordings in the folder `voice` beside the checkpoint's, the new model
beside both. A server that is started later finds them there.
"""
import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
import time

import numpy as np

from files.audio import SAMPLE_RATE
from live.recordings import (find_recordings, level_of, make_prompts, problem_with, save_recording,
                             trim_noisy, write_prompts)

LEAST = 8  # recordings
LONGEST, UPLOAD = 15, 30  # seconds of a recording, and until it has arrived
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Refused(ValueError):
    """A request that cannot be met, in one sentence."""


class Lessons:
    """Of one server. use(duplex) makes its conversations continue with another model."""

    def __init__(self, checkpoint, duplex, use, minutes=5.0, extra=()):
        self.checkpoint, self.use = os.path.normpath(checkpoint), use
        self.minutes, self.extra = minutes, extra  # more flags of teach.py
        self.models, self.which = {"old": duplex}, "old"  # those that have been loaded
        self.beginning = False  # of learning
        self.folder = os.path.join(os.path.dirname(self.checkpoint), "voice")
        self.prompts, self.process, self.message, self.begun = make_prompts(), None, "", None

    # what the page asks

    def status(self):
        seconds = round(time.monotonic() - self.begun) if self.process else 0
        return {"prompts": [p.text for p in self.prompts], "least": LEAST, "message": self.message,
                "recorded": [n for n in sorted(find_recordings(self.folder)) if n < len(self.prompts)],
                "learning": self.process is not None, "passed": seconds,
                "left": self.seconds_left(seconds), "which": self.which, "has_new": self.taught() is not None}

    def taught(self):
        """The folder of the model that has learned last, or None."""
        parent, name = os.path.split(os.path.abspath(self.checkpoint))
        with contextlib.suppress(OSError):
            found = [int(m[1]) for other in os.listdir(parent)
                     if (m := re.fullmatch(rf"{re.escape(name)}-taught-(\d{{1,6}})", other))]
            return f"{self.checkpoint}-taught-{max(found)}" if found else None

    def seconds_left(self, passed):
        """From the log of the training; before it has begun, a guess."""
        if not self.process:
            return 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            with open(os.path.join(self.out + ".partial/model/log.jsonl"), encoding="utf-8") as f:
                lines = [json.loads(line) for line in f]
            return max(1, [line["seconds_left"] for line in lines if line.get("seconds_left")][-1])
        return max(30, round(60 * self.minutes + 90 - passed))

    def record(self, number, data):
        """Save recording `number` of 16-bit samples: {"problem": None or a sentence, "level": in dB}."""
        if self.process:
            raise Refused("it is learning; record more when it is done")
        if not 0 <= number < len(self.prompts) or len(data) % 2:
            raise Refused("there is no such prompt")
        x = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        problem = problem_with(x, self.prompts[number])
        if not problem:
            os.makedirs(self.folder, exist_ok=True)
            write_prompts(self.folder, self.prompts)
            save_recording(self.folder, number, trim_noisy(x, margin=0.3))
        return {"problem": problem, "level": round(float(level_of(x))) if not problem else None}

    def discard(self):
        if self.process:
            raise Refused("it is learning from them")
        for path in find_recordings(self.folder).values():
            os.remove(path)

    async def teach(self):
        if self.process or self.beginning:
            raise Refused("it is learning already")
        self.beginning = True
        try:
            await self.begin()
        finally:
            self.beginning = False

    async def begin(self):
        found = len(self.status()["recorded"])
        if found < LEAST:
            raise Refused(f"it needs {LEAST} recordings at least; there are {found}")
        number = int(self.taught().rsplit("-", 1)[1]) if self.taught() else 0
        self.out, self.message, self.begun = f"{self.checkpoint}-taught-{number + 1}", "", time.monotonic()
        with open(os.path.join(self.folder, "teaching.log"), "wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "teaching.teach", "--checkpoint", os.path.abspath(self.checkpoint),
                "--recordings", os.path.abspath(self.folder), "--out", os.path.abspath(self.out), "--minutes",
                str(self.minutes), *self.extra, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": ROOT})
        with contextlib.suppress(AttributeError, OSError):  # Windows has no such thing
            ours = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, self.process.pid, ours + 10)  # conversations come first
        self.waiting = asyncio.ensure_future(self.wait())

    async def wait(self):
        """Until the process has ended; then the new model takes over, or the old one stays."""
        code = await self.process.wait()
        try:
            if code < 0:  # killed: it could not tidy up
                shutil.rmtree(self.out + ".partial", ignore_errors=True)
            if code:
                said = (self.last_line("error: ") or self.last_line()) if code == 1 else ""
                raise ValueError(said or f"the process ended with code {code}")
            self.models.pop("new", None)
            await self.switch("new")
            self.message = f"It has learned your voice. {self.last_line(' were answered ')}".strip()
        except (ValueError, OSError, RuntimeError) as e:
            reason = f"{e}".partition("\n")[0].removeprefix("error: ").rstrip(".")
            self.message = f"It could not learn: {reason}. The old model is still there."
        finally:
            self.process = None

    def last_line(self, with_words=""):
        with contextlib.suppress(OSError):
            with open(os.path.join(self.folder, "teaching.log"), encoding="utf-8", errors="replace") as f:
                lines = [line.strip() for line in f.read().replace("\r", "\n").split("\n")]
            return next((line for line in reversed(lines) if line and with_words in line), "")[:300]
        return ""

    def load(self, which):
        """A model of this server, loaded when it is first used."""
        if which not in self.models:
            m = self.models["old"]
            self.models[which] = type(m).load(self.taught(), m.device)
            self.models[which].sampling = m.sampling
        return self.models[which]

    async def switch(self, which):
        if which != "old" and not (which == "new" and self.taught()):
            raise Refused("there is no such model yet")
        await self.use(await asyncio.to_thread(self.load, which))
        self.which = which

    async def stop(self, seconds=10):
        """Ends the learning. The recordings stay."""
        if self.process:
            process, self.process = self.process, None
            self.waiting.cancel()
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), seconds)
            except (TimeoutError, asyncio.TimeoutError):
                process.kill()
            shutil.rmtree(self.out + ".partial", ignore_errors=True)

    # HTTP

    async def answer(self, request):
        """The JSON for a request. Raises Refused."""
        what = request.match_info.get("what", "status")
        number = request.query.get("number", "")
        if what == "recording" and number.isdecimal() and len(number) < 4:
            try:
                data = await asyncio.wait_for(read_body(request, 2 * LONGEST * SAMPLE_RATE), UPLOAD)
            except (TimeoutError, asyncio.TimeoutError):
                raise Refused(f"the recording did not arrive in {UPLOAD} seconds") from None
            verdict = self.record(int(number), data)
            return {**self.status(), **verdict}
        if what == "model":
            await self.switch(request.query.get("which"))
        elif what == "teach":
            await self.teach()
        elif what == "discard":
            self.discard()
        elif what != "status":
            raise Refused("the page asks for nothing like this")
        return self.status()


async def read_body(request, limit):
    data = b""
    async for chunk in request.content.iter_chunked(65_536):
        data += chunk
        if len(data) > limit:
            raise Refused(f"a recording lasts {LONGEST} seconds at most")
    return data
