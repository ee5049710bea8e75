"""The built book in a real browser: every page at three widths and in dark mode.

Chromium is driven over its debugging pipe. The book is the one that `make reproduce` has built;
`EFFSPINENET_BOOK` names another folder of HTML.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from sphinx_external_toc.parsing import parse_toc_yaml

REPOSITORY = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
BOOK = Path(os.environ.get("EFFSPINENET_BOOK") or REPOSITORY / "_build" / "book" / "html")
PHONE, TABLET, LAPTOP = 390, 820, 1280
SECONDS = 30.0

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
with_book = pytest.mark.skipif(
    not (BOOK / "index.html").exists(), reason=f"no book is built in {BOOK}; see `make reproduce`"
)

# Faults of a page as it lies in the window: what a reader would see.
FAULTS = """(() => {
  const faults = [];
  const width = document.documentElement.clientWidth;
  const scrolls = (node) => {
    for (let box = node.parentElement; box && box !== document.body; box = box.parentElement) {
      if (/auto|scroll|hidden|clip/.test(getComputedStyle(box).overflowX)) return true;
    }
    return false;
  };
  if (document.documentElement.scrollWidth > width + 1) {
    const wide = [...document.querySelectorAll("body *")].filter(
      (node) => node.getBoundingClientRect().right > width + 1 && !scrolls(node));
    const names = wide.slice(0, 3).map((node) => `${node.tagName}.${node.className}`);
    faults.push(`wider than the window: ${names.join(", ")}`);
  }
  for (const image of document.querySelectorAll("article img")) {
    if (!image.getAttribute("alt")) faults.push(`no alternative text: ${image.src}`);
  }
  for (const image of document.querySelectorAll("article figure svg")) {
    if (!image.getAttribute("aria-label")) faults.push("no alternative text: a drawing");
  }
  return faults;
})()"""
LINKS = "[...document.querySelectorAll('a[href]')].map((link) => link.href)"


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
        options += ["--disable-component-update", "--hide-scrollbars", f"--user-data-dir={folder}"]
        options += ["--remote-debugging-pipe", "--allow-file-access-from-files", "about:blank"]
        pipes = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        self.process = subprocess.Popen(
            ["sh", "-c", pipes, "sh", CHROMIUM, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.sent, self.buffer, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.sent += 1
        message: dict[str, Any] = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
            assert ready, "Chromium does not answer"
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            assert block, "Chromium ended"
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def resize(self, width: int) -> None:
        """Set the width of the window in pixels; a phone's is one with a touch screen."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=width == PHONE)

    def prefer(self, scheme: str) -> None:
        """Prefer `light` or `dark` pages."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        given = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in given, given
        return given["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.1)
        return value

    def errors(self) -> list[str]:
        """What the page has reported on the console since it was opened."""
        found = []
        for event in self.events:
            method, given = event.get("method"), event.get("params", {})
            failed = method == "Runtime.exceptionThrown"
            failed |= method == "Runtime.consoleAPICalled" and given["type"] == "error"
            failed |= method == "Log.entryAdded" and given["entry"]["level"] == "error"
            if failed:
                found.append(json.dumps(given)[:300])
        return found

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def pages() -> list[str]:
    return [f"{name}.html" for name in parse_toc_yaml(REPOSITORY / "_toc.yml")]


def address(page: Path) -> str:
    return page.resolve().as_uri()


def broken_links(links: list[str]) -> list[str]:
    """Links to files that are not there, or to places that they do not have."""
    broken = []
    for link in dict.fromkeys(links):
        parts = urlsplit(link)
        path = Path(unquote(parts.path))
        if parts.scheme != "file":
            continue
        if not path.exists():
            broken.append(link)
        elif parts.fragment and path.suffix == ".html":
            place = unquote(parts.fragment)
            text = path.read_text(encoding="utf-8")
            broken += [] if f'id="{place}"' in text else [link]
    return broken


def faults_of(browser: Browser, page: Path) -> list[str]:
    """What is wrong with a page at three widths and in dark mode."""
    browser.prefer("light")
    browser.resize(LAPTOP)
    browser.open(address(page))
    found = [f"broken link: {link}" for link in broken_links(browser.run(LINKS))]
    for width in (LAPTOP, TABLET, PHONE):
        browser.resize(width)
        found += [f"{width} px: {fault}" for fault in browser.run(FAULTS)]
    found += [f"console: {error}" for error in browser.errors()]
    browser.prefer("dark")
    browser.open(address(page))
    found += [f"dark: {fault}" for fault in browser.run(FAULTS)]
    return found + [f"dark console: {error}" for error in browser.errors()]


@with_book
@pytest.mark.parametrize("page", pages())
def test_a_page_has_no_faults(browser: Browser, page: str) -> None:
    assert faults_of(browser, BOOK / page) == []
    theme, ground = browser.run(
        "[document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]"
    )
    assert theme == "dark"
    assert max(map(int, ground.removeprefix("rgb(").rstrip(")").split(","))) < 100, ground


@with_book
def test_code_is_hidden_until_the_switch_is_pressed(browser: Browser) -> None:
    browser.resize(LAPTOP)
    browser.open(address(BOOK / "notebooks" / "table_09_architecture_ablation.html"))
    seen = "[...document.querySelectorAll('.cell_input')].filter((c) => c.offsetHeight).length"
    assert browser.run(seen) == 0
    browser.run("document.querySelector('.esn-code-switch').click()")
    assert browser.run(seen) == browser.run("document.querySelectorAll('.cell_input').length") > 5
    browser.open(address(BOOK / "notebooks" / "table_08_learned_distribution.html"))
    assert browser.run(seen) > 5  # it is remembered
    browser.run("document.querySelector('.esn-code-switch').click()")
    assert browser.run(seen) == 0


@with_book
def test_the_first_column_stays_while_a_table_scrolls_on_a_phone(browser: Browser) -> None:
    browser.resize(PHONE)
    browser.open(address(BOOK / "notebooks" / "table_03_one_stage_detection.html"))
    place = (
        "(() => { const box = document.querySelector('.esn-table > div'); box.scrollLeft = LEFT;"
        "return [box.scrollLeft, box.querySelector('tbody th').getBoundingClientRect().left]; })()"
    )
    start, before = browser.run(place.replace("LEFT", "0"))
    moved, after = browser.run(place.replace("LEFT", "120"))
    assert (start, moved) == (0, 120)
    assert abs(after - before) <= 3  # the table's own border


@with_book
def test_the_search_of_the_book_finds_a_page(browser: Browser) -> None:
    browser.resize(LAPTOP)
    browser.open(address(BOOK / "search.html") + "?q=DeepLabv3")
    browser.wait(
        "[...document.querySelectorAll('#search-results li a')]"
        ".some((link) => link.href.includes('table_11_semantic_segmentation'))"
    )
    assert browser.errors() == []


@with_book
def test_the_results_are_filtered_by_item(browser: Browser) -> None:
    browser.resize(LAPTOP)
    browser.open(address(BOOK / "book" / "results.html"))
    count = "document.querySelector('.dt-info')?.textContent"
    everything = browser.wait(count)
    names = "[...document.querySelectorAll('.dtsp-searchPane .dtsp-name')]"
    browser.wait(f"{names}.length")
    browser.run(f"{names}.find((name) => name.textContent === 'table-09').click()")
    filtered = browser.wait(f"{count} !== {json.dumps(everything)} && {count}")
    first = browser.run(
        "[...document.querySelector('.dt-info').closest('.dt-container')"
        ".querySelectorAll('.dt-layout-table tbody tr td:first-child')]"
        ".filter((cell) => !cell.closest('.dtsp-searchPanes')).map((cell) => cell.textContent)"
    )
    assert set(first) == {"table-09"}, filtered
    assert browser.errors() == []


FAULTY = """<!doctype html><html><body><article>
<div style="width: 2000px">wide</div>
<div style="overflow-x: auto"><div style="width: 3000px">in a scroll box</div></div>
<img src="data:,"><figure><svg role="img"></svg></figure>
<a href="nowhere.html">1</a><a href="#nothing">2</a><a href="#here" id="here">3</a>
<script>console.error("said"); null.thrown</script></article></body></html>"""


def test_the_checks_find_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(FAULTY)
    found = "\n".join(faults_of(browser, page))
    for fault in ("1280 px: wider", "390 px: wider", "a drawing", "data:,", "said", "Uncaught"):
        assert fault in found
    assert "nowhere.html" in found
    assert "#nothing" in found
    assert "#here" not in found
    page.write_text("<!doctype html><html><body><article>fine</article></body></html>")
    assert faults_of(browser, page) == []
