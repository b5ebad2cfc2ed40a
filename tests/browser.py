"""A real headless Chromium, driven over its DevTools pipe: keys, clicks, screenshots, downloads."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-zygote",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8, "Enter": 13, "Tab": 9}
PATIENCE = 30.0  # seconds


def find() -> str:
    """The browser: `$BROWSER`, or one on the path. Raises FileNotFoundError, with what to do."""
    for name in (os.environ.get("BROWSER", ""), *NAMES):
        if name and (path := shutil.which(name)):
            return path
    raise FileNotFoundError("no Chromium here: run `make test-browser`, or set BROWSER to one")


class Page:
    """One tab. Every call waits until the browser has answered."""

    def __init__(self, to: Any, back: Any) -> None:
        self.to, self.back, self.number, self.session = to, back, 0, ""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol. Raises RuntimeError when the browser refuses it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _message(self) -> bytes:
        read = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            read += byte
        return bytes(read)

    def run(self, script: str) -> Any:
        """The value of an expression in the page. Raises RuntimeError when it throws."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"]))
        return done["result"].get("value")

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until(lambda: self.run("document.readyState === 'complete' && location.protocol"))

    def until(self, true: Callable[[], Any]) -> Any:
        """What `true` returns as soon as it is true. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE
        while not (value := true()):
            if time.monotonic() > end:
                raise TimeoutError("the page did not get there")
            time.sleep(0.02)
        return value

    def press(self, *keys: str) -> None:
        """Press and release keys, by their DOM names; a character is typed."""
        for key in keys:
            typed = {"text": key} if len(key) == 1 else {}
            typed |= {"text": "\r"} if key == "Enter" else {}
            code = KEYS.get(key, ord(key[0]))
            for kind in ("keyDown", "keyUp"):
                text = typed if kind == "keyDown" else {}
                self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text
                )

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse, wherever it is on the page."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    def screenshot(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def started(home: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A browser with an empty profile in `home`; what it downloads lies in `home/downloads`."""
    (home / "downloads").mkdir(parents=True)
    (commands, to), (back, answers) = os.pipe(), os.pipe()
    flags = [*FLAGS, f"--user-data-dir={home / 'profile'}", f"--window-size={width},{height}"]
    # The browser reads commands from its file 3 and writes answers to its file 4.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
    quiet = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in range(3)]
    joined = [(os.POSIX_SPAWN_DUP2, end, n) for n, end in enumerate(ends, 3)]
    path = find()
    process = os.posix_spawn(path, [path, *flags], os.environ, file_actions=[*quiet, *joined])
    for end in (commands, answers, *ends):
        os.close(end)
    with os.fdopen(to, "wb") as writing, os.fdopen(back, "rb") as reading:
        page = Page(writing, reading)
        try:
            target = page.call("Target.createTarget", url="about:blank")["targetId"]
            attached = page.call("Target.attachToTarget", targetId=target, flatten=True)
            page.call(
                "Browser.setDownloadBehavior",
                behavior="allow",
                downloadPath=str(home / "downloads"),
            )
            page.session = attached["sessionId"]
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
            yield page
        finally:
            os.kill(process, signal.SIGTERM)
            os.waitpid(process, 0)
