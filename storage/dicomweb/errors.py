"""What a DICOMweb request can do wrong, beside asking for what is not there. Both are permanent."""

from storage.errors import PermanentError


class BadRequestError(PermanentError):
    """The request cannot be understood (HTTP 400)."""


class NotAcceptableError(PermanentError):
    """Nothing that is offered suits the Accept header (HTTP 406); the reason lists what is offered."""
