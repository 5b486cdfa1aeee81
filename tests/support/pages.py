"""Actions on the page in a browser."""

from collections.abc import Callable
from typing import Any

from playwright.sync_api import Locator, Page


def choose_photo(page: Page, data: bytes) -> None:
    page.set_input_files("#choose", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": data})


def localize_after(page: Page, act: Callable[[], Any]) -> dict[str, Any]:
    """The response of `/v1/localize` to a request that `act` causes."""
    with page.expect_response("**/v1/localize") as response:
        act()
    return response.value.json()


def sent_field(page: Page, field: str) -> str | None:
    """A field of the last form."""
    return page.evaluate("field => window.sent.get(field)", field)


def data_transfer(page: Page, data: bytes) -> Any:
    """A photo as a browser's DataTransfer."""
    make = """bytes => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "p.jpg", {type: "image/jpeg"}));
        return data;
    }"""
    return page.evaluate_handle(make, list(data))


def contrast(element: Locator) -> float:
    """WCAG contrast of an element's text with what is behind it."""
    return element.evaluate("""element => {
        const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const light = (colour) => {
            pen.fillStyle = colour;
            pen.fillRect(0, 0, 1, 1);
            const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(part);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const behind = [];
        for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
        const back = behind.map(light).at(-1), front = light(getComputedStyle(element).color);
        return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    }""")
