"""Hides torch from tests that check for it without needing it: importing the real one takes six seconds."""

raise ImportError("no torch in this test")
