"""From raw photos to a city dataset: manifest, photo checks, streets and districts, addresses, split."""
