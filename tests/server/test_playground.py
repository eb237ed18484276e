"""The page at /, in a real Chromium, against a real server."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import pytest
import soundfile
from PIL import Image
from support.browser import launched
from support.page import DEMO, SCENE, WAIT_MS, drop, fact, last_answer, opened, plain, questions, shoot, until
from support.serving import Server, running_server
from support.tiny_whisper import RATE, make_tiny_whisper, sound

from mm_core.server.routes.playground import FOLDER, KINDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

KEY = "key-of-the-page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as made:
        yield made


@pytest.fixture(scope="module")
def open_server() -> Iterator[Server]:
    """Without keys, as on one's own machine."""
    with running_server() as running:
        yield running


def test_a_picture_is_dropped_asked_about_and_answered(browser: Browser, open_server: Server) -> None:
    first, second = questions("scene.jpg")[:2]
    with opened(browser, open_server, color_scheme="light") as page:
        assert page.locator("#model").inner_text() == "qwen2vl-nano"
        shoot(page, "empty-light")
        page.evaluate("""() => {
            window.grown = [];
            const seen = () => window.grown.push(document.querySelector(".answered .words")?.textContent ?? "");
            new MutationObserver(seen).observe(document.getElementById("turns"), { childList: true, subtree: true });
        }""")
        drop(page, SCENE)
        page.locator("#tray img").wait_for()
        # From here on there is no mouse.
        assert page.evaluate("document.activeElement.id") == "question"
        page.keyboard.type(first["question"])
        shoot(page, "attached-light")
        page.keyboard.press("Enter")
        answer = last_answer(page)
        words = answer.locator(".words").inner_text()
        assert plain(words) == first["answer"]
        steps = [text for text in dict.fromkeys(page.evaluate("window.grown")) if text]
        assert all(words.startswith(text) for text in steps)
        assert re.fullmatch(r"\d+ of \d+ tokens cached", fact(answer, "cached"))
        assert re.fullmatch(r"0 of (\d+) tokens not encoded again", fact(answer, "encoder"))
        assert re.fullmatch(r"\d+(\.\d+)? m?s", fact(answer, "ttft"))
        assert re.fullmatch(r"\d+ tokens/s", fact(answer, "speed"))
        assert page.locator("#status").inner_text() == words  # told whole, once

        assert page.evaluate("document.activeElement.id") == "question"
        page.keyboard.type("Which of them is brown?")  # a turn of the same conversation
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.answered .reuse').length === 2")
        assert int(fact(last_answer(page), "cached").split()[0]) > 100

        page.locator("#new").focus()
        page.keyboard.press("Enter")
        assert page.locator(".turn").count() == 0
        drop(page, SCENE)
        page.keyboard.type(second["question"])
        page.keyboard.press("Enter")
        answer = last_answer(page)
        assert plain(answer.locator(".words").inner_text()) == second["answer"]
        cached, prompt = map(int, re.findall(r"\d+", fact(answer, "cached")))
        media, of = map(int, re.findall(r"\d+", fact(answer, "encoder")))
        assert 100 < cached < prompt
        assert media == of > 0
        until(page, "document.querySelectorAll('#lanes .bar').length >= 3")
        until(page, "document.querySelectorAll('.answered .spent').length === 1")
        until(page, "document.querySelectorAll('#levels .device').length === 1")
        until(page, "document.querySelectorAll('#rate-chart .line').length === 1")
        shoot(page, "answered-light")


def test_several_files_are_chosen_and_pasted(browser: Browser, open_server: Server) -> None:
    pair, files = questions("pair-a.jpg", "pair-b.jpg")[0], [DEMO / "pair-a.jpg", DEMO / "pair-b.jpg"]
    with opened(browser, open_server) as page:
        with page.expect_file_chooser() as chosen:
            page.locator("#files").focus()
            page.keyboard.press("Space")
        chosen.value.set_files(files[0])
        page.locator("#tray li").wait_for()
        page.evaluate(
            """([bytes]) => {
                const data = Uint8Array.from(atob(bytes), (each) => each.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([data], "", { type: "image/jpeg" }));
                const paste = new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
                document.activeElement.dispatchEvent(paste);
            }""",
            [base64.b64encode(files[1].read_bytes()).decode()],
        )
        assert page.locator("#tray .name").all_inner_texts() == ["pair-a.jpg", "pasted image"]
        page.locator("#question").fill(pair["question"])
        page.keyboard.press("Enter")
        answer = last_answer(page)
        assert plain(answer.locator(".words").inner_text()) == pair["answer"]
        assert page.locator(".asked img").count() == 2


def test_a_video_is_asked_about(browser: Browser, open_server: Server, tmp_path: Path) -> None:
    with opened(browser, open_server) as page:
        page.locator("#files").set_input_files(_clip(tmp_path / "clip.mp4"))
        page.locator("#tray li").wait_for()
        page.keyboard.type("What is in the picture?")
        page.keyboard.press("Enter")
        answer = last_answer(page)
        assert answer.locator(".problem").count() == 0
        assert int(fact(answer, "encoder").split()[2]) > 0


def _clip(path: Path) -> Path:
    """Two seconds of one picture."""
    with Image.open(SCENE) as image, av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
        for _ in range(8):
            file.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB").resize((112, 112)))))
        file.mux(stream.encode())
    return path


def test_a_long_answer_can_be_stopped(browser: Browser, open_server: Server) -> None:
    with opened(browser, open_server) as page:
        page.route("**/v1/chat/completions", _never_ends)
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        page.locator("#stop").wait_for()
        until(page, "document.querySelectorAll('#lanes .bar.open').length === 1")  # seen on its way
        length = "document.querySelector('.answered .words').textContent.length"
        until(page, f"{length} > 0")
        begun = page.evaluate(length)
        until(page, f"{length} > {begun}")  # seen growing
        page.keyboard.press("Escape")
        answer = last_answer(page)
        assert "You stopped it." in answer.inner_text()
        assert page.locator("#ask").is_visible()
        assert page.evaluate("document.activeElement.id") == "question"
        until(page, "document.getElementById('running').textContent === '0'")


def _never_ends(route: Any) -> None:
    """The zoo's model stops soon by itself; asked so, it does not."""
    body = {**json.loads(route.request.post_data), "ignore_eos": True, "max_tokens": 1500}
    route.continue_(post_data=json.dumps(body))


def test_a_broken_picture_is_told_and_nothing_is_lost(browser: Browser, open_server: Server) -> None:
    with opened(browser, open_server) as page:
        drop(page, Path("broken.jpg"), data=b"\xff\xd8\xff\xe0 no picture at all")
        page.keyboard.type("What is it?")
        page.keyboard.press("Enter")
        failed = page.locator(".answered.failed")
        failed.wait_for()
        told = failed.locator(".problem").inner_text()
        assert re.search(r"(invalid_image|unsupported_media) · req-[0-9a-f]{32}", told)
        assert page.locator("#question").input_value() == "What is it?"
        assert page.locator("#tray li").count() == 1
        shoot(page, "broken-light")
        page.locator("#tray .remove").click()
        drop(page, Path("notes.txt"), "text/plain", b"no media")
        assert "not something this model reads" in page.locator("#problem").inner_text()
        page.keyboard.press("Control+a")
        page.keyboard.type("What is it?")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.answered .reuse').length === 1")


def test_what_a_model_writes_is_text(browser: Browser, open_server: Server) -> None:
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    with opened(browser, open_server) as page:
        chunks = [json.dumps({"choices": [{"delta": {"content": part}}]}) for part in (text[:9], text[9:])]
        body = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
        page.keyboard.type("<i>question</i>")
        page.keyboard.press("Enter")
        assert last_answer(page).locator(".words").inner_text() == text
        assert page.locator(".asked .words").inner_text() == "<i>question</i>"
        assert page.locator(".turns img, .turns b").count() == 0


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_nothing_is_inaccessible(browser: Browser, open_server: Server, scheme: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    # The policy of the page would keep the checker out.
    with opened(browser, open_server, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce") as page:
        drop(page, SCENE)
        page.keyboard.type("Name every shape, from left to right.")
        assert _violations(Axe().run(page)) == []
        page.keyboard.press("Enter")
        last_answer(page)
        drop(page, SCENE)
        page.locator("#settings summary").click()
        until(page, "document.querySelectorAll('.answered .spent').length === 1")
        shoot(page, f"answered-{scheme}")
        found = Axe().run(page)
        assert len(found.response["passes"]) > 20
        assert _violations(found) == []


def _violations(found: Any) -> list[str]:
    return [
        f"{each['id']}: {node['html'][:120]} {node['any'][0]['message'] if node['any'] else ''}"
        for each in found.response["violations"]
        for node in each["nodes"]
    ]


def test_the_whole_page_can_be_walked_with_the_keyboard(browser: Browser, open_server: Server) -> None:
    with opened(browser, open_server) as page:
        drop(page, SCENE)
        page.locator(".skip").focus()
        names = []
        for _ in range(20):
            name, outline = page.evaluate("""() => {
                const at = document.activeElement;
                const shown = at.id === "files" ? at.nextElementSibling : at;
                return [at.id || at.className || at.tagName, getComputedStyle(shown).outlineStyle];
            }""")
            if name == "BODY" or name in names:
                break
            names.append(name)
            assert outline == "solid", f"{name} does not show that it has the focus"
            page.keyboard.press("Tab")
        assert names == ["skip", "new", "theme", "remove", "question", "files", "ask", "SUMMARY"]


def test_the_theme_can_be_chosen_and_is_kept(browser: Browser, open_server: Server) -> None:
    with opened(browser, open_server, color_scheme="light") as page:
        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(paper)
        for wanted, dark in (("Theme: light", False), ("Theme: dark", True)):
            page.locator("#theme").click()
            assert page.locator("#theme").inner_text() == wanted
            assert (page.evaluate(paper) != light) is dark
        page.reload()
        page.locator("#model", has_text="qwen2vl-nano").wait_for()
        assert page.evaluate(paper) != light
        page.wait_for_timeout(100)


@pytest.mark.parametrize("width", [360, pytest.param(768, marks=pytest.mark.slow), 1920])
def test_it_fits(browser: Browser, open_server: Server, width: int) -> None:
    with opened(browser, open_server, viewport={"width": width, "height": 740}) as page:
        drop(page, SCENE.with_name("a-picture-with-quite-a-long-name-of-its-own.jpg"), data=SCENE.read_bytes())
        page.keyboard.type("Name every shape, from left to right.")
        page.keyboard.press("Enter")
        last_answer(page)
        drop(page, SCENE.with_name("a-picture-with-quite-a-long-name-of-its-own.jpg"), data=SCENE.read_bytes())
        page.locator("#settings summary").click()
        sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert sizes[0] == sizes[1] == width
        outside = page.evaluate("""() => [...document.querySelectorAll("body *")].filter((each) =>
            !each.closest(".hidden, .skip, svg, [hidden]") && each.getBoundingClientRect().right > innerWidth + 1
        ).map((each) => each.outerHTML.slice(0, 100))""")
        assert outside == []
        shoot(page, f"width-{width}")


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    with running_server(in_process=True, decode_workers=0, keys=(KEY, "another")) as server:
        with browser.new_context() as context:
            page = context.new_page()
            page.set_default_timeout(WAIT_MS)
            page.goto(server.url)
            page.locator("#problem", has_text="API key").wait_for()
            assert page.locator("#key").is_visible()
            shoot(page, "locked")
            page.locator("#key").fill(KEY)
            page.keyboard.press("Tab")
            page.locator("#model", has_text="qwen2vl-nano").wait_for()
            until(page, "document.getElementById('dot').dataset.state === 'ready'")
            page.locator("#question").fill("hello")
            page.keyboard.press("Enter")
            last_answer(page)
            assert page.evaluate("Object.values(localStorage)") == []
            assert page.evaluate("Object.values(sessionStorage)") == [KEY]
            until(page, "document.querySelectorAll('#lanes .bar').length >= 1")
        other = _sample(server, "another")
        assert other["generation_tokens"] > 0  # the sums are everybody's
        assert other["ended"] == other["calls"] == []  # whose they are is not told
        assert len(_sample(server, KEY)["ended"]) == 1


def _sample(server: Server, key: str) -> Any:
    with server.http(key) as client, client.stream("GET", "/playground/live") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        line = next(line for line in reply.iter_lines() if line.startswith("data: "))
        return json.loads(line.removeprefix("data: "))


@pytest.mark.slow
def test_a_recording_is_written_down(browser: Browser, tmp_path: Path) -> None:
    model = make_tiny_whisper(tmp_path, max_target_positions=64, stamp_scale=0.45)
    soundfile.write(tmp_path / "tones.wav", sound(2.0, 4), RATE)
    options = {"in_process": True, "decode_workers": 1, "served_model_name": "tiny-whisper"}
    with running_server(model, **options) as server, opened(browser, server) as page:
        page.locator("#empty-text", has_text="sound").wait_for()
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        assert "attach one recording" in page.locator("#problem").inner_text()
        page.keyboard.press("Control+a")
        page.keyboard.press("Delete")
        page.locator("#files").set_input_files(tmp_path / "tones.wav")
        page.locator("#tray audio").wait_for()
        page.evaluate("""() => {
            const own = window.fetch;
            window.fetch = async (...asked) => {
                const reply = await own(...asked);
                if (!asked[0].includes("transcriptions")) return reply;
                const [read, kept] = reply.body.tee();
                new Response(kept).text().then((text) => (window.told = text));
                return new Response(read, reply);
            };
        }""")
        page.keyboard.press("Enter")
        answer = last_answer(page)
        until(page, "window.told")
        events = re.findall(r"^data: (\{.*)$", page.evaluate("window.told"), re.MULTILINE)
        done = json.loads(events[-1])  # what a random model says is nonsense, and never the same
        assert done["type"] == "transcript.text.done"
        words = "".join(each.get("delta", "") for each in map(json.loads, events))
        assert answer.locator(".words").text_content() == (words or "(nothing)")
        assert int(fact(answer, "answer").split()[0]) > 0
        shoot(page, "transcribed")


def test_files_of_the_page(open_server: Server) -> None:
    with open_server.http() as client:
        index = client.get("/")
        assert index.status_code == 200
        policy = index.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert index.headers["x-content-type-options"] == "nosniff"
        names = {path.name for path in FOLDER.iterdir()} - {"index.html"}
        named = set(re.findall(r'/playground/([\w.]+)"', index.text))
        assert names == named | {"api.js", "live.js", "media.js", "view.js"}
        for name in names:
            reply = client.get(f"/playground/{name}")
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith(KINDS[Path(name).suffix])
            assert reply.headers["x-content-type-options"] == "nosniff"
            again = client.get(f"/playground/{name}", headers={"If-None-Match": reply.headers["etag"]})
            assert again.status_code == 304
        for wrong in ("/playground/", "/playground/../app.py", "/playground/%2e%2e/app.py", "/playground/absent.js"):
            assert client.get(wrong).status_code == 404
    scripts = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", scripts)
    assert set(re.findall(r"https?://[\w./]+", scripts)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script>|\son\w+=|\sstyle=", (FOLDER / "index.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_an_engine_that_dies_is_shown_and_comes_back(browser: Browser, open_server: Server) -> None:
    with opened(browser, open_server) as page:
        os.kill(open_server.stats()["engine"]["engine_process"]["pid"], signal.SIGKILL)
        until(page, "['dead', 'starting'].includes(document.getElementById('dot').dataset.state)")
        assert re.search("the engine is (dead|starting)", page.locator("#live-state").inner_text())
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        page.locator(".answered.failed .problem", has_text="engine").wait_for()
        until(page, "document.getElementById('dot').dataset.state === 'ready'")
        assert page.locator("#question").input_value() == "hello"
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.answered .reuse').length === 1")
