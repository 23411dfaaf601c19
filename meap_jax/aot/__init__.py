"""Programs for hardware that is not here: compiled, and their memory and time estimated."""
