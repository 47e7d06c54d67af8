"""BERT encoders as pure functions of (params, batch). Start with functional.py."""
