"""Questions asked of a model: encode, predict, score, write a cell."""
