"""Using a finished model: its parts, media from files, conversations, answers."""
