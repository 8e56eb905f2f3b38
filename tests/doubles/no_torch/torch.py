"""A machine without torch, for what asks after it and is not about it: importing the real one takes six seconds."""

raise ImportError("no torch in this test")
