"""A headless Chromium for tests, spoken to through its own pipe: no driver, no port, no package."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0
KEYS = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, " ": 32}


class Browser:
    """One process; `page` opens tabs."""

    def __init__(self, program: str, profile: str) -> None:
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Chromium reads from 3 and writes to 4; first out of the way of both.
        child_in, child_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (theirs, answers))

        def places() -> None:
            os.dup2(child_in, 3)
            os.dup2(child_out, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=places,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs, answers, child_in, child_out):
            os.close(fd)
        self._rest = b""
        self._next = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what happens meanwhile is kept in `events`."""
        self._next += 1
        number = self._next
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            for answer in self._messages(end):
                if answer.get("id") != number:
                    self.events.append(answer)
                elif "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                else:
                    return answer["result"]

    def _messages(self, end: float) -> Iterator[dict[str, Any]]:
        if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError("the browser does not answer")
        data = os.read(self._read, 1 << 20)
        if not data:
            raise RuntimeError("the browser has gone")
        *whole, self._rest = (self._rest + data).split(b"\0")
        return iter([json.loads(message) for message in whole])

    @contextmanager
    def page(self, file: Path, place: str = "", **options: Any) -> Iterator[Page]:
        """A tab with `file` in it, loaded and closed again. Options are those of `Page.open`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        try:
            page.open(file, place, **options)
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._write)
        os.close(self._read)


class Page:
    """A tab. `problems` is what a person would see red in the console, `requests` what was asked of a network."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def open(
        self,
        file: Path,
        place: str = "",
        *,
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
        media: str = "screen",
        scripts: bool = True,
    ) -> None:
        """Load a file from disk and wait until it is there: its records too, where scripts run."""
        self.call("Performance.enable", timeDomain="threadTicks")
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=file.resolve().as_uri() + place)
        here = "location.protocol === 'file:' && document.readyState === 'complete'"
        self.wait(here + (" && document.documentElement.dataset.ready === 'yes'" if scripts else ""))

    def wait(self, expression: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(expression):
            if time.monotonic() > end:
                raise AssertionError(f"not within {PATIENCE:.0f} s: {expression}; console: {self.problems}")
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """The JSON value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    @property
    def work(self) -> float:
        """Seconds that the page's own thread has worked for since it was opened."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))

    def press(self, key: str) -> None:
        """A key, as a person presses it, on whatever has the focus."""
        text = {"Enter": "\r", " ": " "}.get(key)
        common = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        events = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [e["params"] for e in events if e["method"] in methods]

    @property
    def problems(self) -> list[str]:
        thrown = [e["exceptionDetails"]["text"] for e in self._events("Runtime.exceptionThrown")]
        said = [str(e["args"]) for e in self._events("Runtime.consoleAPICalled") if e["type"] in ("error", "warning")]
        logged = [e["entry"]["text"] for e in self._events("Log.entryAdded")]
        return thrown + said + logged

    @property
    def requests(self) -> list[str]:
        """Everything that was loaded beside the file itself and what it carries."""
        urls = [e["request"]["url"] for e in self._events("Network.requestWillBeSent")]
        return [url for url in urls[1:] if not url.startswith("data:")]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for as long as the block; the test is skipped where there is none."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            yield browser
        finally:
            browser.close()
