"""The page in a real Chromium, with the service's routes over two real cities."""

import json
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from addressvlm.storage.tables import PHOTOS, write_table
from tests.support.in_process_service import application, served
from tests.support.pages import choose_photo, contrast, data_transfer, localize_after, sent_field
from tests.support.running_service import STREETS, photo, two_cities

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (install the package `chromium`)"),
    pytest.mark.xdist_group("page"),
]
PATIENCE = 120_000  # ms; bounds a hang, nothing waits this long
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
REMEMBER_FORMS = """
    const ask = window.fetch;
    window.fetch = (path, options) => {
        if (options?.body instanceof FormData) window.sent = options.body;
        return ask(path, options);
    };
"""  # the browser API does not show a form with a file
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("page")
    systems = two_cities(root)
    streets = ["Mill Street", "Mill Street", "Oak Avenue"]
    rows = [
        {"id": str(n), "place": "1", "street": street, "image": {"bytes": photo(n), "path": None}}
        for n, street in enumerate(streets)
    ]
    write_table(systems[0].parents[1] / "photos", "test", rows, PHOTOS)
    with served(application(root, cities=[str(system) for system in systems], dtype="float32")) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page; at the end it must have no script errors and no requests to other servers."""
    expect.set_options(timeout=PATIENCE)
    contexts, errors, foreign_requests = [], [], []

    def visit(query: str = "", **device: Any) -> Page:
        contexts.append(context := browser.new_context(reduced_motion="reduce", **device))
        context.set_default_timeout(PATIENCE)
        context.add_init_script(REMEMBER_FORMS)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
        page.on("request", lambda r: None if r.url.startswith((url, "blob:", "data:")) else foreign_requests.append(r.url))
        page.goto(url + query)
        expect(page.locator("#map .district")).not_to_have_count(0)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []
    assert foreign_requests == []


@pytest.fixture
def page(opened: Open) -> Page:
    return opened("/?threshold=0", viewport={"width": 1280, "height": 900})


def test_photo_to_address_and_map(page: Page) -> None:
    expect(page.locator("#result")).to_be_hidden()
    expect(page.locator("#attribution")).to_have_text("Made up")
    result = localize_after(page, lambda: choose_photo(page, photo()))
    assert sent_field(page, "city") == "toytown"
    assert sent_field(page, "prior") is None
    expect(page.locator("#street")).to_have_text(result["address"]["street"])
    expect(page.locator("#candidates li")).to_have_count(len(result["candidates"]))
    names = page.locator("#candidates .name").all_inner_texts()
    assert names == [f"{c['street']} {c['district']}" for c in result["candidates"]]
    expect(page.locator("#verdict")).to_contain_text(f"{100 * result['confidence']:.0f} %")
    assert page.locator("#status").inner_text().endswith(f"{result['address']['street']}, {result['address']['district']}.")
    expect(page.locator(".candidates path")).to_have_count(len(STREETS))
    assert sorted(page.locator("#map .badge").all_inner_texts()) == [str(n + 1) for n in range(len(STREETS))]
    heats = page.locator(".candidates path").evaluate_all("paths => paths.map((p) => getComputedStyle(p).stroke)")
    assert len(set(heats)) > 1


def test_an_address_that_is_not_known_is_named_as_likely_as_it_is(opened: Open) -> None:
    page = opened("/?threshold=1&top_k=2")
    result = localize_after(page, lambda: choose_photo(page, photo()))
    assert (sent_field(page, "threshold"), result["known"], result["address"]) == ("1", False, None)
    best = result["candidates"][0]
    expect(page.locator("#reason")).to_have_text(result["reason"])
    expect(page.locator("#candidates li")).to_have_count(2)

    def show(confidence: float) -> Any:
        changed = result | {"confidence": confidence, "candidates": [best | {"probability": confidence}]}
        page.route("**/v1/localize", lambda route: route.fulfill(json=changed))
        localize_after(page, lambda: choose_photo(page, photo()))
        expect(page.locator("#verdict")).to_contain_text(f"{100 * confidence:.0f} %")
        page.unroute("**/v1/localize")
        return page.locator("#plate").inner_text(), page.locator("#status").inner_text()

    plate, sentence = show(0.86)
    assert plate.split("\n") == [best["street"], best["district"]]
    assert sentence == f"Very likely, 86 %: {best['street']}, {best['district']}."
    plate, sentence = show(0.2)
    assert plate.startswith("I don't know")
    assert sentence.startswith("I don't know. The likeliest is")


def test_photos_to_try(page: Page) -> None:
    expect(page.locator("#tries button")).to_have_count(2)
    result = localize_after(page, page.get_by_role("button", name="Photo 2").click)
    expect(page.locator("#verdict")).to_contain_text(f"{100 * result['confidence']:.0f} %")
    expect(page.locator("#picture")).to_be_visible()


def test_paste_and_drop(page: Page) -> None:
    data = data_transfer(page, photo(2))
    dropped = localize_after(page, lambda: page.dispatch_event("#drop", "drop", {"dataTransfer": data}))
    expect(page.locator("#plate")).to_be_visible()
    paste = "d => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: d}))"
    pasted = localize_after(page, lambda: page.evaluate(paste, data))
    assert [c["street"] for c in pasted["candidates"]] == [c["street"] for c in dropped["candidates"]]


def test_photos_are_uploaded_small_upright_and_without_exif(page: Page) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"  # shot with the camera turned
    out = BytesIO()
    Image.new("RGB", (4000, 1000), "grey").save(out, "JPEG", exif=exif)
    localize_after(page, lambda: choose_photo(page, out.getvalue()))
    uploaded = bytes(page.evaluate("async () => [...new Uint8Array(await window.sent.get('file').arrayBuffer())]"))
    assert b"where I live" not in uploaded
    with Image.open(BytesIO(uploaded)) as image:
        assert (image.size, dict(image.getexif())) == ((400, 1600), {})


def test_keyboard_alone_is_enough(page: Page) -> None:
    expect(page.locator("#tries button")).to_have_count(2)
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        ring = page.evaluate("""() => {
            const it = document.activeElement;
            return getComputedStyle(it.matches("label.button input") ? it.parentElement : it).outlineStyle;
        }""")
        assert ring == "solid", order
    assert order == ["city", "choose", "BUTTON", "BUTTON", "map", "closer", "further", "all", "SUMMARY"]
    choose_photo(page, photo())
    expect(page.locator("#plate")).to_be_visible()
    page.locator("#candidates button").first.focus()
    expect(page.locator(".candidates path.lit")).to_have_count(1)

    def viewport() -> list[float]:
        return [float(v) for v in page.locator("#map svg").get_attribute("viewBox").split()]

    page.locator("#map").focus()
    page.keyboard.press("0")
    x, _, wide, _ = viewport()
    page.keyboard.press("+")
    assert viewport()[2] < wide
    page.keyboard.press("ArrowRight")
    assert viewport()[0] > x
    page.locator("#where summary").focus()
    page.keyboard.press("Enter")
    page.locator("#map").focus()
    localize_after(page, lambda: page.keyboard.press("Enter"))
    x, y, wide, high = viewport()
    circle = json.loads(sent_field(page, "prior"))["circle"]
    assert circle["radius_m"] == 200
    expect(page.locator(".circle circle")).to_have_count(2)
    assert float(page.locator(".circle circle").first.get_attribute("cx")) == pytest.approx(x + wide / 2, abs=1)
    assert float(page.locator(".circle circle").first.get_attribute("cy")) == pytest.approx(y + high / 2, abs=1)


def test_district_and_circle_are_the_prior(page: Page) -> None:
    choose_photo(page, photo())
    expect(page.locator("#candidates li")).to_have_count(len(STREETS))
    page.locator("#where summary").click()
    page.locator("#map").focus()
    page.keyboard.press("0")
    box = page.locator("#map").bounding_box()
    view = [float(v) for v in page.locator("#map svg").get_attribute("viewBox").split()]
    spot = page.evaluate("""() => {
        const street = [...document.querySelectorAll(".streets path")].find((p) => p.textContent === "Mill Street");
        const at = street.getPointAtLength(street.getTotalLength() * 0.1);
        return [at.x, at.y];
    }""")
    at = {"x": (spot[0] - view[0]) / view[2] * box["width"], "y": (spot[1] - view[1]) / view[3] * box["height"]}
    result = localize_after(page, lambda: page.locator("#map").click(position=at))
    circle = json.loads(sent_field(page, "prior"))["circle"]
    assert circle["lat"] == pytest.approx(52.0, abs=2e-4)
    assert circle["lon"] == pytest.approx(0.002, abs=2e-4)
    assert "Mill Street" in [c["street"] for c in result["candidates"]]
    assert "Oak Avenue" not in [c["street"] for c in result["candidates"]]
    expect(page.locator("#only")).to_have_text("only in the circle of 200 m")

    result = localize_after(page, lambda: page.locator("#in").select_option("Harbour"))
    assert json.loads(sent_field(page, "prior"))["districts"] == ["Harbour"]
    assert {c["district"] for c in result["candidates"]} == {"Harbour"}
    nowhere = {"x": box["width"] - 3, "y": box["height"] - 3}
    localize_after(page, lambda: page.locator("#map").click(position=nowhere))
    expect(page.locator("#status.bad")).to_be_visible()
    expect(page.locator("#result")).to_be_hidden()
    result = localize_after(page, lambda: page.locator("#clear").click())
    assert sent_field(page, "prior") is None
    assert len(result["candidates"]) == len(STREETS)
    expect(page.locator("#status.bad")).to_have_count(0)


def test_changing_the_city_localizes_in_its_streets(opened: Open) -> None:
    page = opened("/?threshold=0")
    assert page.locator("#city option").all_inner_texts() == ["Toytown", "St. Alder"]
    assert localize_after(page, lambda: choose_photo(page, photo()))["city"] == "Toytown"
    expect(page.locator("#ask")).to_be_visible()
    result = localize_after(page, lambda: page.locator("#city").select_option("St. Alder"))
    assert result["city"] == "St. Alder"
    expect(page.locator("#model")).to_have_text(result["model"])
    expect(page.locator("#intro")).to_contain_text("St. Alder")
    expect(page.locator(".streets path")).to_have_count(2)
    assert set(page.locator("#candidates .name").all_inner_texts()) == {"Elm Row Harbour", "Oak Avenue Harbour"}
    with page.expect_request("**/v1/chat/completions") as chat_request:
        page.get_by_role("button", name="Which street is this? Name it.").click()
    assert chat_request.value.post_data_json["model"] == result["model"]
    expect(page.locator("#talk .it")).to_contain_text(result["address"]["street"])
    linked = opened(f"/?city={page.locator('#city').input_value()}")
    expect(linked.locator("#intro")).to_contain_text("St. Alder")


def test_follow_up_questions_carry_the_conversation(page: Page) -> None:
    choose_photo(page, photo())
    with page.expect_request("**/v1/chat/completions"):
        page.get_by_role("button", name="Which street is this? Name it.").click()
    expect(page.locator("#send")).to_be_enabled()
    first = page.locator("#talk .it").inner_text()
    page.locator("#question").fill("What colour is the sky?")
    with page.expect_request("**/v1/chat/completions") as chat_request:
        page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_enabled()
    body = chat_request.value.post_data_json
    assert body["stream"] is True
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert body["messages"][1]["content"].strip() == first.strip()
    expect(page.locator("#talk .me")).to_have_text(["Which street is this? Name it.", "What colour is the sky?"])
    expect(page.locator("#talk .bad")).to_have_count(0)
    assert page.locator("#talk").get_attribute("aria-busy") == "false"


def test_errors_are_shown_and_can_be_retried(page: Page) -> None:
    refused = localize_after(page, lambda: choose_photo(page, b"<html>not a photo</html>"))
    expect(page.locator("#status.bad")).to_have_text(refused["error"]["message"])
    expect(page.locator("#again")).to_be_hidden()
    page.context.set_offline(True)
    choose_photo(page, photo(1))
    expect(page.locator("#status.bad")).to_contain_text("can't be reached")
    expect(page.locator("#result")).to_be_hidden()
    page.context.set_offline(False)
    localize_after(page, page.locator("#again").click)
    expect(page.locator("#plate")).to_be_visible()
    expect(page.locator("#status.bad")).to_have_count(0)
    page.context.set_offline(True)
    page.get_by_role("button", name="Which street is this? Name it.").click()
    expect(page.locator("#talk .bad")).to_contain_text("can't be reached")
    expect(page.locator("#send")).to_be_enabled()


def test_on_a_phone(opened: Open) -> None:
    page = opened("/?threshold=0", **PHONE)
    expect(page.locator("#camera")).to_be_visible()
    assert page.locator("#shoot").get_attribute("capture") == "environment"
    page.set_input_files("#shoot", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo()})
    expect(page.locator("#plate")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for target in page.locator("button:visible, .button:visible, summary:visible").all():
        box = target.bounding_box()
        assert min(box["width"], box["height"]) >= 24, target
    page.locator("#where summary").tap()
    page.locator("#map").scroll_into_view_if_needed()
    localize_after(page, lambda: page.locator("#map").tap(position={"x": 80, "y": 150}))
    assert "circle" in json.loads(sent_field(page, "prior"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark_mode(opened: Open, scheme: str) -> None:
    page = opened("/?threshold=0", color_scheme=scheme)
    choose_photo(page, photo())
    expect(page.locator("#plate")).to_be_visible()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(244, 242, 236)"
    assert light == (scheme == "light")
    for text in (
        "h1",
        "#intro",
        "#street",
        "#verdict",
        "#meaning",
        "#candidates small",
        "#candidates .share",
        "#send",
        "footer",
    ):
        assert contrast(page.locator(text).first) >= 4.5, text
    assert (
        page.locator("#picture").evaluate("p => (document.body.classList.add('busy'), getComputedStyle(p).animationName)")
        == "none"
    )
