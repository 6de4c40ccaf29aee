"""The methods of the literature, each the method of its paper as far as a city's data carries it."""
