"""Hosts, and what happens to a run when something happens to them."""
