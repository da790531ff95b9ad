"""The studio: a page to make, compare and watch videos, and to convert files (`studio.py`)."""
