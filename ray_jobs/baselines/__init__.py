"""One module a kind of system in `compare.systems`: each gives what it makes of the photos that a comparison asks about."""
