"""Maps of how similar a city's photos are to texts."""

from pathlib import Path

import numpy as np
import pytest

from addressvlm import InputError
from addressvlm.baselines.dual_encoder import build_dual_encoder
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.tools import map_drawing, similarity_map
from tests.support.dual_encoders import photo_run
from tests.support.tiny import tiny_llava


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny"))


def test_a_map_shows_where_photos_are_like_a_text(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = photo_run(tmp_path, base)
    run, encoder = Run(config), build_dual_encoder(None, str(base), "float32", 0)
    (tmp_path / "model").mkdir()
    encoder.save(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(run.folder), "Mill Street", "Harbour", "--out"]
    similarity_map.main([*arguments, str(tmp_path / "map.svg")])
    drawn = (tmp_path / "map.svg").read_text()
    assert drawn.count("<use ") >= 6  # three places on each of two maps
    assert "Mill Street: most similar photos" in capsys.readouterr().out
    photos = similarity_map.photo_similarity(encoder, list(tables.iter_rows(run.photos, "test")), ["Mill Street"])
    assert photos.similarity.shape == (3, 1)
    with pytest.raises(InputError, match=r"end it in \.svg"):
        similarity_map.main([*arguments, str(tmp_path / "map.txt")])
    with pytest.raises(InputError, match="a text that is not empty"):
        similarity_map.photo_similarity(encoder, list(tables.iter_rows(run.photos, "test")), [" "])


def test_a_place_is_the_mean_of_its_photos_on_a_map_that_is_true_to_shape() -> None:
    lonlat = np.array([[10.0, 60.0], [10.2, 60.0], [10.1, 60.1]])
    photos = similarity_map.PhotoSimilarity(
        list("abc"), ["x", "y", "x"], lonlat, np.array([[0.2, 0.4], [0.5, 0.5], [0.6, 0.8]])
    )
    where, like = photos.by_place()
    assert where == pytest.approx(np.array([[10.05, 60.05], [10.2, 60.0]]))
    assert like == pytest.approx(np.array([[0.4, 0.6], [0.5, 0.5]]))
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    map_drawing.set_extent(axis, *similarity_map.map_extent(np.array([[10.0, 59.9], [10.2, 60.1]])))  # 11 by 22 kilometres
    (west, east), (south, north) = axis.get_xlim(), axis.get_ylim()
    assert (10.0 - west, east - 10.2, 59.9 - south, north - 60.1) == pytest.approx((0.02, 0.02, 0.01, 0.01))
    assert axis.get_aspect() == pytest.approx(2)
