"""The page at `/` in a real Chromium; those tests are skipped where there is none."""

import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image
from served import FakeComponents, Gate, Running, serving, until

from flashdiff.engines.runtime.fake import GUIDED
from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.http.page import PAGE, content_security_policy
from flashdiff.server.images import encode_image

LISTEN = Listen(port=0, http_port=0)
PROMPT = "a green monster"
ALICE = "alice-secret-0123456"
_FAULTS = Path(__file__).with_name("page_faults.js")


def test_the_page_needs_no_token_and_may_load_nothing_but_itself(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {ALICE}\n")
    with serving(FakeComponents(), Listen(port=0, http_port=0, tokens=tokens)) as running:
        answer = httpx.get(running.url)
    assert (answer.status_code, answer.text) == (200, PAGE.read_text(encoding="utf-8"))
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"].count("'sha256-") == policy["style-src"].count("'sha256-") == 1
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_policy_follows_the_page() -> None:
    page = "<style>a</style><script>b</script>"
    assert content_security_policy(page) != content_security_policy(page.replace("b", "c"))
    assert not re.search(r"""(?:src|href)="(?!data:|#)|\son\w+="|\sstyle=|@import|url\(""", PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed: Debian has it as chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it is in the extra dev")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not run as root
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(FakeComponents(), LISTEN) as running:
        yield running


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, running: Running) -> Iterator[Open]:
    """Opens the page of a server in a new window; afterwards no window may have broken the policy or called another origin."""
    windows, urls, complaints = [], list[str](), list[str]()

    def open_page(url: str = running.url, *, before: Callable[[Any], None] = lambda page: None, **options: Any) -> Any:
        window = browser.new_context(**options)
        windows.append(window)
        window.set_default_timeout(60_000)
        page = window.new_page()
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        before(page)
        page.goto(url)
        return page

    yield open_page
    for window in windows:
        window.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
    assert {urlsplit(url).hostname for url in urls if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert not [url for url in urls if "monster" in url or "?" in url]


def _wait(page: Any, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).wait_for()


def _generate(page: Any, prompt: str = PROMPT) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()


def _files(page: Any) -> list[bytes]:
    """The images that are shown."""
    script = """images => Promise.all(images.map(async (image) => {
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 < 3);
    }))"""
    return [bytes(pixels) for pixels in page.locator("#images img").evaluate_all(script)]


def _pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


@pytest.mark.slow
def test_a_prompt_becomes_images_that_can_be_downloaded_and_made_again(running: Running, open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Size", exact=True).select_option("128x64")
    page.get_by_label("Images", exact=True).fill("2")
    page.get_by_label("Seed").fill("18446744073709551615")
    _generate(page)
    _wait(page, "#status", "2 images in")
    with Client(running.address) as client:
        expected = client.generate(PROMPT, seed=2**64 - 1, count=2, size=(128, 64), timeout_s=60).images  # type: ignore[arg-type]
    shown = _files(page)
    assert shown == list(map(_pixels, expected))
    assert {"waiting", "denoising", "decoding"} <= set(page.locator("#stages dt").all_text_contents())
    assert page.locator("#images .seed").all_text_contents() == ["seed 18446744073709551615", "seed 0"]
    with page.expect_download() as download:
        page.locator("#images").get_by_label("Download the image of seed 0").click()
    assert download.value.suggested_filename == "flashdiff-fake-0.png"
    assert download.value.path().read_bytes() == expected[1]

    page.get_by_label("Images", exact=True).fill("4")
    _generate(page, "something else")
    _wait(page, "#status", "4 images in")
    page.locator("#past").get_by_label("Same seed again: 18446744073709551615").last.click()
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT
    page.keyboard.press("Enter")
    _wait(page, "#status", "1 image in")
    assert _files(page) == shown[:1]
    assert page.locator("#past li").count() == 7
    page.locator("#past").get_by_label("Show: a green monster, seed 0").click()
    assert _files(page) == shown[1:]


@pytest.mark.slow
def test_a_preview_is_shown_after_each_step_until_the_request_is_cancelled(running: Running, open_page: Open) -> None:
    page = open_page()
    gate = Gate(running.fake, "denoiser", after=2)
    _generate(page)
    assert gate.entered.wait(600)
    _wait(page, "#images .badge", "step 2 of 4")
    assert page.locator("#images img").get_attribute("alt") == "Preview after step 2 of 4"
    page.keyboard.press("Escape")
    _wait(page, "#status", "Cancelled")
    gate.open()
    until(lambda: not running.server.worker.pending_images)
    assert page.locator("#images img").count() == 0
    _generate(page)
    _wait(page, "#status", "1 image in")
    running.fake.fail_on = "decoder"
    _generate(page)
    _wait(page, "#error", "The server could not finish.")
    running.fake.fail_on = None
    page.get_by_role("button", name="Try again").click()
    _wait(page, "#status", "1 image in")


@pytest.mark.slow
def test_what_is_wrong_is_said_at_its_field(running: Running, open_page: Open) -> None:
    page = open_page()
    page.get_by_role("button", name="Generate").click()
    _wait(page, "#error", "Write a prompt first.")
    assert page.locator("#prompt").get_attribute("aria-invalid") == "true"
    page.get_by_label("Seed").fill(str(2**64))
    _generate(page)
    _wait(page, "#error", "The seed must be a whole number")
    page.get_by_label("Seed").fill("")
    _generate(page, "word " * 33)
    _wait(page, "#error", "at most 32 words fit")
    assert page.evaluate("document.activeElement.id") == "prompt"
    _generate(page)
    _wait(page, "#status", "1 image in")
    assert page.locator("#error").text_content() == ""
    assert page.locator("#prompt").get_attribute("aria-invalid") is None
    busy = {"error": {"message": "the queue is full", "param": None}}
    refuse = {"status": 429, "headers": {"retry-after-ms": "1100"}, "json": busy}
    page.route("**/v1/images/generations", lambda route: route.fulfill(**refuse), times=1)
    _generate(page)
    _wait(page, "#error", "The server is busy. Try again in 2 s.")
    _wait(page, "#status", "You can try again now.")
    page.get_by_role("button", name="Try again").click()
    _wait(page, "#status", "1 image in")
    running.stop()
    _generate(page)
    _wait(page, "#error", "The server does not answer.")


@pytest.mark.slow
def test_a_token_is_asked_for_and_kept_for_the_tab_and_a_rate_says_when_to_try_again(open_page: Open, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {ALICE} 0.001\nbob bob-secret-0123456789\n")
    with serving(FakeComponents(), Listen(port=0, http_port=0, tokens=tokens)) as running:
        page = open_page(running.url)
        page.get_by_label("Token").fill("wrong-secret-0123456")
        page.keyboard.press("Enter")
        _wait(page, "#error", "The server does not know this token.")
        page.get_by_label("Token").fill("bob-secret-0123456789")
        page.keyboard.press("Enter")
        _wait(page, "#served", "bundle")
        page.reload()
        _wait(page, "#served", "bundle")
        assert not page.locator("#access").is_visible()
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        page.evaluate("token => sessionStorage.setItem('flashdiff.token', token)", ALICE)
        _generate(page)
        _wait(page, "#status", "1 image in")
        _generate(page)
        _wait(page, "#error", "The server is busy. Try again in ")
        assert re.search(r"Try again in \d+ s\.", page.locator("#error").text_content())
        assert page.locator("#retry").get_attribute("aria-disabled") == "true"


def _upload(page: Any, width: int = 200, height: int = 100) -> bytes:
    pixels = np.full((height, width, 3), (200, 30, 40), dtype=np.uint8)
    file = encode_image(pixels, "png")
    page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": file})
    page.locator("#canvas").wait_for()
    return file


@pytest.mark.slow
def test_an_image_to_start_from_is_sent_with_its_strength(running: Running, open_page: Open) -> None:
    page = open_page()
    file = _upload(page)
    page.get_by_label("Strength").fill("0.5")
    page.get_by_label("Seed").fill("5")
    _generate(page)
    _wait(page, "#status", "1 image in")
    with Client(running.address) as client:
        expected = client.generate(PROMPT, seed=5, image=file, strength=0.5, timeout_s=60).images[0]
    assert _files(page) == [_pixels(expected)]
    page.locator("#images").get_by_role("button", name="Start from").click()
    _wait(page, "#status", "The image is set.")
    page.get_by_role("button", name="Remove the image").click()
    assert page.get_by_label("Choose, drop or paste an image").is_visible()
    page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    _wait(page, "#error", "not an image that the browser can read")


@pytest.mark.slow
def test_a_mask_is_painted_where_a_task_takes_one(open_page: Open) -> None:
    sent = list[dict[str, Any]]()

    def watched(page: Any) -> None:
        def edits(route: Any) -> None:
            head = f"content-type: {route.request.headers['content-type']}\r\n\r\n".encode()
            parts = message_from_bytes(head + route.request.post_data_buffer).get_payload()
            sent.append({part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts})
            route.continue_()

        page.route("**/v1/images/edits", edits)

    page = open_page(before=watched)
    _upload(page)
    canvas = page.get_by_label("The image to start from")
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 4
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10, y)
    page.mouse.up()
    canvas.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert page.get_by_label("Strength").input_value() == "1"  # what the task with a mask has by default
    _generate(page)
    _wait(page, "#status", "1 image in")
    picture, mask = (Image.open(io.BytesIO(sent[0][name])) for name in ("image", "mask"))
    assert picture.size == mask.size
    alpha = np.asarray(mask.getchannel("A"))
    height, width = alpha.shape
    assert (alpha[height // 4, width // 4], alpha[height // 2, width * 3 // 4]) == (0, 0)
    assert (alpha[height - 1, 0], alpha[height // 2, width // 4]) == (255, 255)
    page.get_by_role("button", name="Clear").click()
    _generate(page)
    until(lambda: page.wait_for_timeout(10) is None and len(sent) == 2)
    assert "mask" not in sent[1]


@pytest.mark.slow
def test_a_model_that_takes_no_mask_has_no_brush(running: Running, open_page: Open) -> None:
    running.fake.spec = running.fake.spec.model_copy(update={"tasks": ("text_to_image", "image_to_image")})
    page = open_page()
    _upload(page)
    assert not page.locator("#brush").is_visible()


@pytest.mark.slow
def test_all_of_it_works_by_keyboard(running: Running, open_page: Open) -> None:
    page = open_page()
    _wait(page, "#served", "bundle")
    reached = []
    page.locator(".skip").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or reached[-1] == "image"
        if reached[-1] == "image":
            break
    assert reached == ["prompt", "generate", "model", "size", "steps", "count", "seed", "image"]
    page.locator("#prompt").focus()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("with horns")
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#steps-value").text_content() == "3"
    gate = Gate(running.fake)
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    assert gate.entered.wait(600)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "cancel"
    page.keyboard.press("Space")
    _wait(page, "#status", "Cancelled")
    assert page.evaluate("document.activeElement.id") == "generate"
    gate.open()
    page.keyboard.press("Space")
    _wait(page, "#status", "1 image in")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_the_screen_and_every_control_can_be_read_and_has_a_name(open_page: Open, width: int, scheme: str) -> None:
    with serving(FakeComponents(GUIDED), LISTEN) as running:
        page = open_page(running.url, viewport={"width": width, "height": 720}, color_scheme=scheme)
        page.get_by_label("Negative prompt").fill("blue")
        page.get_by_label("Steps", exact=True).fill("10")
        page.get_by_label("Images", exact=True).fill("5")
        _upload(page)
        page.get_by_label("Seed").fill("9" * 20)
        _generate(page, "monster" * 20)
        _wait(page, "#error", "The seed must be")
        assert page.evaluate(_FAULTS.read_text()) == []
        page.get_by_label("Seed").fill("9" * 19)
        _generate(page, "monster" * 20)
        _wait(page, "#status", "5 images in")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(_FAULTS.read_text()) == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == (scheme == "dark")
