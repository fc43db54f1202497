"""The embedded default: a synthetic assistant language in which the true credit of every token is known."""
