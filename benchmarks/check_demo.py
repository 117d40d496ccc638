"""Does the page of ``adacm2 demo`` work in a real browser, with a video and with a webcam?

    python benchmarks/check_demo.py [--run RUN] [--clip CLIP] [--question Q] [--screenshots DIR]

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver), Gradio and
Selenium. RUN is a run of train.py (by default a tiny one that is trained here), CLIP a video (by
default one that is made here). The webcam is Chromium's own, which shows a moving picture. Prints
what was seen and exits with 1 if something does not hold:

* a question that was there before the start is answered from its own memory, another one from the
  open memory, each beside the newest tokens;
* the timeline, the counts, the line of bytes and both times are there; the bytes are the same after
  a second video of another length;
* a question with markup and templates is shown as it was written;
* the webcam's frames come in, and can be asked about while they do;
* the browser's console has no error, and the page loads nothing from elsewhere.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUESTION = "which digit was on the red ground?"
OTHER = "which digit was on the blue ground?"
#: What would be seen if a question were taken for more than text.
HOSTILE = "<b>${6*7}</b> {{6}}?"
#: Seconds for everything that is waited for.
PATIENCE = 120


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--run", type=pathlib.Path)
    options.add_argument("--clip", type=pathlib.Path)
    options.add_argument("--question", default=QUESTION)
    options.add_argument("--screenshots", type=pathlib.Path)
    given = options.parse_args()
    # In a background job SIGINT is ignored, and so it would be by what is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    browser, driver = find_browser()
    with tempfile.TemporaryDirectory() as made:
        directory = pathlib.Path(made)
        run, clip = given.run, given.clip
        if not run or not clip:
            run, clip = make_run(directory)
            run, clip = given.run or run, given.clip or clip
        shots = given.screenshots or directory
        shots.mkdir(parents=True, exist_ok=True)
        server, address = serve(run, directory)
        try:
            window = open_window(browser, driver, directory)
            try:
                failures = check(Page(window, address, shots), clip.absolute(), given.question)
            finally:
                window.quit()
        finally:
            server.send_signal(signal.SIGINT)  # as who stops it does
            status = server.wait(30)
    if status != 130:
        failures.append(f"Ctrl-C ended the page with status {status}")
    print(f"does not hold: {'; '.join(failures)}" if failures else "the page works")
    return 1 if failures else 0


def find_browser() -> tuple[str, str]:
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(found):
        sys.exit("error: Chromium is missing: apt-get install chromium chromium-driver (Debian)")
    return found[0], found[1]


def make_run(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The tests' smallest run, and a clip of twenty seconds."""
    command = [sys.executable, "train.py", "--config=tests/small.py", "--config.train.steps=2"]
    command += [f"--workdir={directory / 'run'}", f"--config.data.data_dir={directory / 'data'}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    program = (
        "import sys; from tests.video.make_videos import encode, numbered_frames\n"
        "encode(sys.argv[1], numbered_frames(200, 96, 64), fps=10)"
    )
    clip = directory / "clip.mp4"
    subprocess.run([sys.executable, "-c", program, str(clip)], cwd=ROOT, check=True)
    return directory / "run", clip


def serve(run: pathlib.Path, directory: pathlib.Path) -> tuple[subprocess.Popen, str]:
    """Starts the page on a free port of this machine and waits until it is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "adacm2_jax.commands", "demo", "--model", str(run)]
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in server.stdout:
        if "the page is at" in line:
            return server, f"http://127.0.0.1:{port}"
    sys.exit(f"error: adacm2 demo ended with status {server.wait()}")


def open_window(browser: str, driver: str, directory: pathlib.Path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new",
        "--window-size=1280,1500",
        "--force-color-profile=srgb",
        f"--user-data-dir={directory / 'browser'}",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        *(["--no-sandbox"] if os.getuid() == 0 else []),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(driver))


class Page:
    """The page as a visitor has it.

    Args:
      window: of the browser.
      address: of the page.
      shots: where screenshots go.
    """

    def __init__(self, window, address: str, shots: pathlib.Path):
        self._window, self._address, self._shots = window, address, shots
        window.get(address)
        self.wait("#question textarea, #question input")
        self.wait("#panel .memory")

    def find(self, selector: str) -> list:
        return self._window.find_elements("css selector", selector)

    def wait(self, selector: str, text: str = "") -> str:
        """Until an element is there whose text matches; returns its text."""
        from selenium.common.exceptions import StaleElementReferenceException

        end, last = time.monotonic() + PATIENCE, ""
        while time.monotonic() < end:
            try:
                for element in self.find(selector):
                    last = element.text
                    if re.search(text, last, re.S):
                        return last
            except StaleElementReferenceException:
                pass  # the page was drawn anew
            time.sleep(0.1)
        self.shoot("failed.png")
        raise SystemExit(f"error: waited in vain for {selector} {text!r}; it says {last!r}")

    def write(self, question: str) -> None:
        (field,) = self.find("#question textarea, #question input")
        field.clear()
        field.send_keys(question)

    def click(self, selector: str) -> None:
        element = self.find(selector)[0]
        self._window.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, selector: str, words: str) -> None:
        """Clicks the button that is seen and whose text or label has one of the words."""
        script = """
            const labels = [];
            for (const each of document.querySelectorAll(arguments[0])) {
                if (!each.offsetParent) continue;
                labels.push(`${each.getAttribute('aria-label') || ''} ${each.innerText}`.trim());
                if (new RegExp(arguments[1], 'i').test(labels.at(-1))) { each.click(); return true }
            }
            return labels"""
        end, labels = time.monotonic() + PATIENCE, []
        while time.monotonic() < end:
            labels = self._window.execute_script(script, selector, words)
            if labels is True:
                return
            time.sleep(0.1)
        self.shoot("failed.png")
        raise SystemExit(f"error: there is no button {words}, but {labels}")

    def choose(self, tab: str) -> None:
        next(each for each in self.find("button[role=tab]") if each.text == tab).click()

    def upload(self, clip: pathlib.Path) -> None:
        self.find("#video input[type=file]")[0].send_keys(str(clip))
        self.wait("#video video")

    def frames(self) -> int:
        seen = re.search(r"of ([\d,]+) frames", self.wait("#panel .memory"))
        return int(seen[1].replace(",", "")) if seen else 0

    def shoot(self, name: str) -> None:
        """A screenshot of the whole page."""
        import base64

        size = self._window.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        made = self._window.execute_cdp_cmd("Page.captureScreenshot", options)
        (self._shots / name).write_bytes(base64.b64decode(made["data"]))

    def errors(self) -> list[str]:
        """What the console complains of."""
        return [
            entry["message"]
            for entry in self._window.get_log("browser")
            if entry["level"] == "SEVERE"
        ]

    def elsewhere(self) -> list[str]:
        """What the page loaded from other places."""
        script = "return performance.getEntriesByType('resource').map(each => each.name)"
        return [
            name
            for name in self._window.execute_script(script)
            if not name.startswith((self._address, "data:", "blob:"))
        ]


def check(page: Page, clip: pathlib.Path, question: str) -> list[str]:
    failures = []

    def holds(what: str, so: bool) -> None:
        print(f"{'ok' if so else 'NOT'}: {what}", flush=True)
        if not so:
            failures.append(what)

    page.write(question)
    page.upload(clip)
    page.click("#start")
    said = page.wait("#answers .memory", r"policy \w+, .* the newest,")
    holds(f"the known question is answered: {said!r}", question in said)
    shown = page.wait("#panel .memory", r"\d ms\n?to the first token")
    holds("frames, layers and bytes are drawn", len(page.find("#panel svg image")) >= 2)
    holds("there are counts", all(word in shown for word in ("tokens seen", "kept", "the most")))
    holds("a frame has a time", re.search(r"\d ms\s+a frame", shown) is not None)
    size = re.search(r"The stream holds ([\d.]+ \w+)", shown)[1]
    read = page.frames()
    page.shoot("video.png")

    page.write(OTHER)
    page.click("#ask")
    said = page.wait("#answers .memory", "the open memory")
    holds("another question is answered from the open memory", OTHER in said)
    page.write(HOSTILE)
    page.click("#ask")
    said = page.wait("#answers .memory", re.escape(HOSTILE[-6:]))
    holds(f"a question is only text: {said!r}", HOSTILE in said)

    page.click("#sample")
    page.wait("#video video")
    page.wait("#question textarea, #question input")
    time.sleep(1)  # the sample's own question takes the place of the last one
    page.click("#start")
    page.wait("#answers .memory", r"policy \w+, .* the newest,")
    shown = page.wait("#panel .memory", r"\d ms\n?to the first token")
    again = re.search(r"The stream holds ([\d.]+ \w+)", shown)[1]
    holds(f"{read} and {page.frames()} frames take {size}", again == size)
    page.shoot("sample.png")

    page.choose("Webcam")
    page.press("#camera button", "access")
    page.wait("#camera video")
    page.press("#camera button", "record|capture|start")
    end = time.monotonic() + PATIENCE
    while not 3 <= page.frames() < 40 and time.monotonic() < end:
        time.sleep(0.2)
    before = page.frames()
    page.write(OTHER)
    page.click("#ask")
    said = page.wait("#answers .memory", re.escape(OTHER) + r".*after \d+ frames")
    time.sleep(3)
    holds(f"the webcam's frames come in: {before}, {page.frames()}", 3 <= before < page.frames())
    holds("the webcam can be asked about", "score" in said)
    page.shoot("webcam.png")
    errors, elsewhere = page.errors(), page.elsewhere()
    holds(f"no error in the console: {errors}", not errors)
    holds(f"nothing is loaded from elsewhere: {elsewhere}", not elsewhere)
    return failures


if __name__ == "__main__":
    sys.exit(main())
