"""Property tests try the same examples every time and are not timed: machines are shared."""

from hypothesis import settings

settings.register_profile("graftline", deadline=None, derandomize=True)
settings.load_profile("graftline")
