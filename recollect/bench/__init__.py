"""`recollect bench`: attention and memories side by side, right before fast, on whatever machine this is."""
