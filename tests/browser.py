"""A headless Chromium with an audio file as its microphone, driven over the DevTools protocol, and a headless
Firefox, whose microphone beeps, over WebDriver BiDi."""
import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
                None)
FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)


class Tab:
    """One page."""

    def __init__(self, ws):
        self.ws, self.ids = ws, itertools.count(1)

    async def call(self, method, **params):
        n = next(self.ids)
        await self.ws.send_json({"id": n, "method": method, "params": params})
        while True:
            answer = json.loads((await self.ws.receive(timeout=120)).data)
            if answer.get("id") == n:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer.get('message') or answer['error']['message']}")
                return answer["result"]

    async def value(self, script):
        """The value of a JavaScript expression, or of the promise that it returns."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True,
                                 userGesture=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, script, seconds=30):
        """Waits until the expression is true and returns it. TimeoutError."""
        for _ in range(int(seconds * 5)):
            with contextlib.suppress(RuntimeError):  # while a page loads it has no scripts
                if value := await self.value(script):
                    return value
            await asyncio.sleep(0.2)
        raise TimeoutError(script)

    async def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                            windowsVirtualKeyCode=code, **text)

    async def picture(self, path, width, height, scale=1, dark=False):
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                        deviceScaleFactor=scale, mobile=width < 600)
        await self.call("Emulation.setEmulatedMedia",
                        features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        await self.value(
            "new Promise(done => requestAnimationFrame(() => { draw(); requestAnimationFrame(done) }))")
        with open(path, "wb") as f:
            f.write(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


class Browser:
    def __init__(self, http, address):
        self.http, self.address = http, address

    async def open(self, url):
        async with self.http.put(f"{self.address}/json/new?{url}") as answer:
            at = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        return Tab(await self.http.ws_connect(at, max_msg_size=0))


@contextlib.asynccontextmanager
async def chromium(folder, microphone=None, allowed=True):
    """A Browser whose microphone repeats a WAV file, or beeps. Unless `allowed`, pages get no microphone."""
    command = [CHROMIUM, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}",
               "--no-first-run", "--disable-gpu",
               "--use-fake-device-for-media-stream", "--autoplay-policy=no-user-gesture-required",
               "--mute-audio",
               f"--use-fake-ui-for-media-stream{'' if allowed else '=deny'}",
               "--disable-background-networking", "--disable-dev-shm-usage"]
    if microphone:
        command.append(f"--use-file-for-fake-audio-capture={microphone}")
    if sys.platform == "linux" and os.geteuid() == 0:
        command.append("--no-sandbox")
    process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        port = os.path.join(folder, "DevToolsActivePort")
        for _ in range(150):
            if os.path.exists(port) and open(port).read().strip():
                break
            await asyncio.sleep(0.2)
        async with aiohttp.ClientSession() as http:
            yield Browser(http, f"http://127.0.0.1:{open(port).readline().strip()}")
    finally:
        process.terminate()
        process.wait(20)


class FirefoxTab(Tab):
    """One page of Firefox; its values are strings, numbers and booleans."""

    async def value(self, script):
        answer = await self.call("script.evaluate", expression=script, awaitPromise=True, userActivation=True,
                                 target={"context": self.context})
        if answer["type"] == "exception":
            raise RuntimeError(f"{script}: {answer['exceptionDetails']['text']}")
        return answer["result"].get("value")


class FirefoxBrowser:
    def __init__(self, ws):
        self.ws = ws

    async def open(self, url):
        tab = FirefoxTab(self.ws)
        await tab.call("session.new", capabilities={})
        tab.context = (await tab.call("browsingContext.create", type="tab"))["context"]
        await tab.call("browsingContext.navigate", context=tab.context, url=url, wait="complete")
        return tab


PREFERENCES = {"media.navigator.permission.disabled": True, "media.navigator.streams.fake": True,
               "media.autoplay.default": 0, "browser.shell.checkDefaultBrowser": False,
               "app.update.enabled": False, "datareporting.policy.dataSubmissionEnabled": False,
               "network.captive-portal-service.enabled": False, "network.connectivity-service.enabled": False}


@contextlib.asynccontextmanager
async def firefox(folder, allowed=True, **preferences):
    """A browser of one tab, in a new profile in this folder. Unless `allowed`, it gets no microphone."""
    os.makedirs(folder, exist_ok=True)
    if not allowed:
        preferences |= {"media.navigator.permission.disabled": False, "permissions.default.microphone": 2}
    with open(os.path.join(folder, "user.js"), "w") as f:
        f.writelines(f'user_pref("{name}", {json.dumps(value)});\n'
                     for name, value in {**PREFERENCES, **preferences}.items())
    process = subprocess.Popen([FIREFOX, "--headless", "--profile", folder, "--remote-debugging-port", "0"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    where, address = os.path.join(folder, "WebDriverBiDiServer.json"), None
    try:
        for _ in range(600):
            with contextlib.suppress(OSError, ValueError), open(where) as f:
                address = "ws://{ws_host}:{ws_port}/session".format(**json.load(f))
                break
            await asyncio.sleep(0.2)
        async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as ws:
            yield FirefoxBrowser(ws)
    finally:
        process.terminate()
        process.wait(20)
