"""Two branches of error: retryable (the same call may succeed later) and permanent (it will not).

Who retries: the uploader of the gateway and the job runner of the centre, and nobody else. A permanent error goes to a
person (quarantine, held study, parked job, HTTP problem details), with `reason` in words that person can use.
"""


class YuanzhenError(Exception):
    """Base of every error this project raises on purpose. `reason` is shown to people: no patient data in it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RetryableError(YuanzhenError):
    """The same call may succeed later: a link, a server or a lock was not there."""


class PermanentError(YuanzhenError):
    """The same call will fail again: a person or a correction is needed."""


class LinkError(RetryableError):
    """The other side could not be reached, or answered 5xx or 429."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class OutOfSpaceError(RetryableError):
    """The disk is at its watermark (C-STORE A700, PS3.4 Table B.2-1)."""


class ObjectStoreError(RetryableError):
    """The object store did not answer, or answered 5xx."""


class ObjectMissingError(PermanentError):
    """No object under that key."""


class DigestMismatchError(RetryableError):
    """The bytes read are not the bytes announced; the sender sends them again."""


class MalformedDataSetError(PermanentError):
    """Not a data set that can be kept as DICOM (C-STORE Cxxx)."""


class IdentityConflictError(PermanentError):
    """One Study Instance UID names two patients; held for a person."""


class IllegalTransitionError(PermanentError):
    """The row was not in a state from which this transition may start."""


class NotFoundError(PermanentError):
    """No such thing for this caller. Another hospital's study is 'not found', never 'forbidden'."""


class ForbiddenError(PermanentError):
    """The caller's role may not do this."""


class LeaseLostError(PermanentError):
    """The case is in other hands, or the lease ran out."""


class SignatureInvalidError(PermanentError):
    """A receipt or a report whose signature does not verify."""


class ConfigurationError(PermanentError):
    """A setting, rule or model file that cannot be used: says file, place and reason."""
