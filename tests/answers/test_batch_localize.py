"""The addresses of a table's photos, with a double of the model that tells a photo by its shade of grey."""

from io import BytesIO

import pytest
from PIL import Image

from addressvlm.answers.address_distribution import Candidate, Localization
from addressvlm.answers.batch_localize import SPLIT, BatchLocalizer, localize_photos, photo_table
from addressvlm.questions import ADDRESS_QUESTION


class Double:
    """Remembers the size of each photo and how many go through the model together."""

    image_size = 20

    def __init__(self):
        self.sizes, self.batches = [], []

    def prepare_questions(self, images, questions):
        assert questions == [ADDRESS_QUESTION]
        self.sizes += [image.size for image in images]
        return [image.getpixel((0, 0))[0] for image in images]

    def localize_prompts(self, prompts, top_k):
        self.batches.append(list(prompts))
        return [answer(shade, top_k) for shade in prompts]


def answer(shade, top_k):
    candidates = [Candidate(f"Street {shade}", "Harbour", shade / 256), Candidate("Elm Row", "Old Town", 1 - shade / 256)]
    return Localization(candidates[:top_k], shade > 100, shade / 256, 0.5)


def png(shade, size=(40, 30)):
    out = BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


def work_of(base="", **more):
    work = BatchLocalizer(**{"model": "x", "dtype": "float32", "trust_remote_code": False, "base": str(base),
                             "max_megapixels": 1, "top_k": 2, "threads": 1, "batch_size": 2, **more})  # fmt: skip
    work.__dict__["_localizer"] = Double()
    return work


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("wrong", [(), (0,), (6,), (1, 2, 3), range(7)])
def test_each_photo_has_its_own_answer_or_reason_in_any_batch(batch_size, wrong):
    double = Double()
    photos = [
        (lambda n=n: f"reason {n}") if n in wrong else (lambda n=n: Image.new("RGB", (30, 20), (10 * n,) * 3))
        for n in range(7)
    ]  # fmt: skip
    result = list(localize_photos(double, photos, 1, batch_size))
    assert result == [f"reason {n}" if n in wrong else answer(10 * n, 1) for n in range(7)]
    assert [len(photos[at : at + batch_size]) for at in range(0, 7, batch_size)] == [
        len(batch) + sum(at * batch_size <= n < (at + 1) * batch_size for n in wrong) for at, batch in enumerate(double.batches)
    ]
    assert list(localize_photos(double, [], 1, batch_size)) == []


def test_a_row_says_what_the_model_said_of_its_photo(tmp_path):
    (tmp_path / "a.png").write_bytes(png(200))
    (tmp_path / "b.png").write_bytes(png(50))
    (tmp_path / "huge.png").write_bytes(png(3, (1100, 1000)))
    rows = [{"row": n, "id": f" {file} ", "file": file} for n, file in enumerate(["b.png", "none.png", "a.png", "huge.png"], 1)]
    result = work_of(tmp_path)(rows)
    (name,) = result.tables
    first, second = result.tables[name]
    assert name == SPLIT
    assert first == {
        "id": "b.png", "street": "Street 50", "district": "Harbour", "confidence": 50 / 256, "known": False,
        "candidates": [
            {"street": "Street 50", "district": "Harbour", "probability": 50 / 256},
            {"street": "Elm Row", "district": "Old Town", "probability": 1 - 50 / 256},
        ],
    }  # fmt: skip
    assert (second["id"], second["street"], second["known"], len(second["candidates"])) == ("a.png", "Street 200", True, 2)
    missing, large = result.rejects
    assert (missing["file"], missing["row"], missing["id"]) == ("none.png", 2, "none.png")
    assert missing["reason"] == f"photo missing: no file {tmp_path / 'none.png'}"
    assert (large["row"], large["id"]) == (4, "huge.png")
    assert large["reason"].startswith("photo too large")


def test_images_in_the_table_are_read_as_bytes_or_with_their_path():
    jpeg = BytesIO()
    Image.new("RGB", (800, 400), (90, 90, 90)).save(jpeg, "JPEG")
    rows = [
        {"id": "a", "image": {"bytes": png(80), "path": "of/a.png"}}, {"id": "b", "image": png(120)},
        {"id": "c", "image": {"bytes": b"no photo", "path": "of/c.png"}}, {"id": "d", "image": None},
        {"id": "e", "image": {"bytes": jpeg.getvalue(), "path": None}},
    ]  # fmt: skip
    work = work_of(top_k=1)
    result = work(rows)
    assert [(row["id"], row["street"], len(row["candidates"])) for row in result.tables[SPLIT]] == [
        ("a", "Street 80", 1), ("b", "Street 120", 1), ("e", "Street 90", 1)
    ]  # fmt: skip
    assert [(reject["id"], reject["file"], reject["row"]) for reject in result.rejects] == [
        ("c", None, None),
        ("d", None, None),
    ]
    assert "of/c.png" in result.rejects[0]["reason"]
    assert result.rejects[1]["reason"] == "photo empty: d has zero bytes"
    assert work._localizer.sizes[-1] == (100, 50)  # decoded small, its shorter side still twice the model's at least


def test_a_list_of_photos_names_each_file_as_it_is_found():
    rows = [
        {"file": "a.jpg", "id": "1"},
        {},
        {"file": "b.jpg", "id": "2"},
        {"file": "c.jpg", "id": "1"},
        {"file": "d.jpg", "id": ""},
    ]
    photos, rejects = photo_table(rows, lambda file: f"found/{file}")
    assert photos == [
        {"row": 1, "id": "1", "file": "found/a.jpg"}, {"row": 3, "id": "2", "file": "found/b.jpg"},
        {"row": 5, "id": "d.jpg", "file": "found/d.jpg"},
    ]  # fmt: skip
    assert [(reject["row"], reject["file"], reject["reason"]) for reject in rejects] == [
        (4, "c.jpg", "duplicate id: '1' is already the id of row 1")
    ]
