"""The server's page in a real Chromium: opened, dropped onto, waited for, and pictured."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.serving import ROOT, Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DEMO = ROOT / "zoo" / "qwen2vl-nano" / "samples" / "demo"
SCENE = DEMO / "scene.jpg"
WAIT_MS = 30_000
# Where the pictures of the page are kept.
SHOTS = Path(os.environ.get("MM_TEST_ARTIFACTS", ROOT / ".out" / "playground"))
_DROP = """([bytes, name, type]) => {
    const data = Uint8Array.from(atob(bytes), (each) => each.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([data], name, { type }));
    const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
    for (const kind of ["dragenter", "dragover"]) document.body.dispatchEvent(new DragEvent(kind, options));
    const shown = !document.getElementById("drop").hidden;
    document.body.dispatchEvent(new DragEvent("drop", options));
    return shown;
}"""


@contextmanager
def opened(browser: Browser, server: Server, **options: Any) -> Iterator[Page]:
    """The page, loaded. At the end nothing may be on the console, and no policy may have been broken."""
    options = {"viewport": {"width": 1280, "height": 860}, **options}
    complaints: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: complaints.append(message.text) if message.type != "debug" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        until(page, "document.getElementById('running').textContent !== '–'")
        yield page
    wrong = [each for each in complaints if "Failed to load resource" not in each]
    assert wrong == []


def questions(*images: str) -> list[dict[str, Any]]:
    """What the demo asks about these pictures, with the answers."""
    rows = json.loads((DEMO / "demo.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["images"] == list(images)]


def plain(text: str) -> str:
    """Without differences that the demo does not mind."""
    return " ".join(text.split()).rstrip(".").lower()


def until(page: Page, expression: str) -> None:
    """Wait until it holds. (Playwright's own wait needs eval, which the page's policy forbids.)"""
    deadline = time.monotonic() + WAIT_MS / 1e3
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def drop(page: Page, path: Path, kind: str = "image/jpeg", data: bytes | None = None) -> None:
    content = base64.b64encode(path.read_bytes() if data is None else data).decode()
    assert page.evaluate(_DROP, [content, path.name, kind]) is True  # the page said where it may be dropped


def last_answer(page: Page) -> Any:
    """The newest answer, when it has ended."""
    answer = page.locator(".answered").last
    answer.and_(page.locator(":not(.growing)")).wait_for()
    return answer


def fact(answer: Any, name: str) -> str:
    return str(answer.locator(f"[data-fact={name}] dd").inner_text())


def shoot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
