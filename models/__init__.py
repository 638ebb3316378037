"""Networks and mathematics: tensors in, tensors out. Knows neither Ray nor tables nor people."""
