"""The one error type that svdlab raises for bad input."""


class SvdlabError(ValueError):
    """Bad input: one line that names the field or file, what was got and what is allowed."""
