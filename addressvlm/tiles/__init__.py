"""Map and imagery tiles with street names."""

import os

# Importing mapnik points PROJ and GDAL at its own data, which breaks rasterio; mapnik here never projects.
_environment = {name: os.environ.get(name) for name in ("PROJ_LIB", "GDAL_DATA")}
import mapnik as _mapnik  # noqa: E402, F401

for _name, _value in _environment.items():
    if _value is None:
        os.environ.pop(_name, None)
    else:
        os.environ[_name] = _value
