"""How good are the labels? A sheet to rate them by eye, ratings by a model, and how far the raters agree."""
