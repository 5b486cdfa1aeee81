"""The page in a real Chromium, over the real service: python -m pytest tests/test_page.py"""

import shutil
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.service import STREETS, photo, running_service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (install the package `chromium`)"),
    pytest.mark.xdist_group("ray"),
]
PATIENCE = 120_000  # ms; bounds a hang, nothing waits this long


@pytest.fixture(scope="module")
def url(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(tmp_path_factory.mktemp("page")) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page on a phone, with a record of what went wrong and of what it asked other servers."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    opened = context.new_page()
    defects, elsewhere = [], []
    opened.on("pageerror", lambda error: defects.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith((url, "blob:", "data:")) else elsewhere.append(r.url))
    opened.goto(url)
    expect(opened.locator("#model")).to_have_text("toytown/addressvlm")
    yield opened
    assert defects == []
    assert elsewhere == []
    context.close()


def give(page: Page, data: bytes, kind: str = "image/jpeg") -> None:
    page.set_input_files("#choose", {"name": "photo.jpg", "mimeType": kind, "buffer": data})


def test_photo_to_address_and_map(page: Page) -> None:
    expect(page.locator("#result")).to_be_hidden()
    give(page, photo())
    expect(page.locator("#plate")).to_be_visible()
    assert page.locator("#street").inner_text() in STREETS
    expect(page.locator("#candidates li")).to_have_count(len(STREETS))
    first = page.locator("#candidates .name").first.inner_text()
    assert first.startswith(page.locator("#street").inner_text())
    expect(page.locator("#streets path.candidate")).to_have_count(len(STREETS))
    expect(page.locator("#badges span")).to_have_count(len(STREETS))
    expect(page.locator("#attribution")).to_have_text("Made up")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_keyboard_alone_is_enough(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    give(page, photo())
    expect(page.locator("#plate")).to_be_visible()
    page.locator("#candidates button").first.focus()
    expect(page.locator("#streets path.lit")).to_have_count(1)
    page.locator("#zoom").focus()
    before = page.locator("#streets").get_attribute("viewBox")
    page.keyboard.press("Enter")
    expect(page.locator("#zoom")).to_have_attribute("aria-pressed", "true")
    assert page.locator("#streets").get_attribute("viewBox") == before  # all four streets are candidates
    page.locator("#question").focus()
    page.keyboard.type("Which district is this?")
    page.keyboard.press("Enter")
    expect(page.locator("#talk .me")).to_have_text("Which district is this?")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#talk .it.bad")).to_have_count(0)
    expect(page.locator("#talk .it")).not_to_have_text("…")


def test_a_follow_up_carries_the_conversation(page: Page) -> None:
    give(page, photo())
    with page.expect_request("**/v1/chat/completions"):
        page.get_by_role("button", name="Which street is this?").click()
    expect(page.locator("#send")).to_be_enabled()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Which district is this?").click()
    messages = sent.value.post_data_json["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_a_bad_file_is_explained_and_the_next_photo_works(page: Page) -> None:
    give(page, b"<html>not a photo</html>")
    expect(page.locator("#status")).to_contain_text("not a JPEG, PNG or WebP")
    expect(page.locator("#result")).to_be_hidden()
    give(page, photo(1))
    expect(page.locator("#plate")).to_be_visible()
    expect(page.locator("#status")).to_have_text("")


def test_paste_and_drop(page: Page) -> None:
    make = f"""async () => {{
        const file = new File([new Uint8Array({list(photo(2))})], "p.jpg", {{type: "image/jpeg"}});
        const data = new DataTransfer();
        data.items.add(file);
        return data;
    }}"""
    data = page.evaluate_handle(make)
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    expect(page.locator("#plate")).to_be_visible()
    page.reload()
    expect(page.locator("#plate")).to_be_hidden()
    data = page.evaluate_handle(make)
    page.evaluate("d => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: d}))", data)
    expect(page.locator("#plate")).to_be_visible()


def test_large_photos_are_shrunk_before_they_travel(page: Page) -> None:
    out = BytesIO()
    Image.new("RGB", (4000, 1000), "grey").save(out, "JPEG")
    give(page, out.getvalue())
    expect(page.locator("#plate")).to_be_visible()
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 2048


def test_light_and_dark_differ(browser: Browser, url: str) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        opened = context.new_page()
        opened.goto(url)
        colours.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(colours) == 2
