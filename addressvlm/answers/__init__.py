"""How a model's answers are made: free, constrained to a city's addresses, or scored over all of them."""
