"""Code that several tests share. Fixtures are in conftest.py."""
