"""Ranks that train one model: their wrappers, averages of gradient rows, checks of weights."""
