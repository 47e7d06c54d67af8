"""Model families, one file each. Start with bert.py."""
