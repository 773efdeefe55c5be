"""The one exception that the commands turn into a single line and exit code 2."""


class InputError(ValueError):
    """A file, folder or data set that a user gave can't be used. The message is one line that names it and says why."""


class OversizedError(InputError):
    """A file is larger than any of its kind has to be."""
