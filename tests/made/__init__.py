"""Fixtures that several folders of tests share; `tests/conftest.py` names them as plugins."""
