"""What an S3 server or the way to it says, as one line and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backupd.errors import ObjectMissing, StoreError


@dataclass(frozen=True, slots=True)
class Place:
    """Where the request went, for messages; nothing secret."""

    bucket: str
    endpoint: str
    region: str

    @property
    def server(self) -> str:
        return self.endpoint or f"AWS S3 ({self.region})"


# Code -> (what happened, what to do). {bucket}, {server}, {region} are filled in.
_KNOWN = {
    "NoSuchBucket": ("there is no bucket {bucket} on {server}", "create it, or correct repository.location"),
    "AccessDenied": (
        "access to bucket {bucket} was denied",
        "the key needs s3:ListBucket on it and s3:GetObject, s3:PutObject, s3:DeleteObject on what it holds",
    ),
    "AllAccessDisabled": ("access to bucket {bucket} is disabled", "ask the provider"),
    "InvalidAccessKeyId": ("{server} does not know the access key", "correct repository.access_key_id"),
    "SignatureDoesNotMatch": ("{server} refused the secret key", "correct repository.secret_access_key"),
    "ExpiredToken": ("the session token has expired", "renew the credentials"),
    "InvalidToken": ("the session token is not valid", "renew the credentials"),
    "RequestTimeTooSkewed": (
        "the clocks of this machine and of {server} differ too much",
        "set this machine's clock (NTP)",
    ),
    "PermanentRedirect": ("bucket {bucket} is not in region {region}", "correct repository.region"),
    "AuthorizationHeaderMalformed": (
        "bucket {bucket} is not in region {region}",
        "correct repository.region",
    ),
    "IllegalLocationConstraintException": (
        "bucket {bucket} is not in region {region}",
        "correct repository.region",
    ),
    "InvalidBucketName": ("{bucket} cannot be the name of a bucket", "correct repository.location"),
    "QuotaExceeded": ("the quota of bucket {bucket} is used up", "raise it, or run `backupd prune`"),
    "XMinioStorageFull": ("{server} is full", "give it space, or run `backupd prune`"),
    "InsufficientStorage": ("{server} is full", "give it space, or run `backupd prune`"),
    "NotImplemented": (
        "{server} does not know this kind of request",
        'set repository.request_checksum = "when_required" for an older server',
    ),
}

_AS = {
    "301": "PermanentRedirect",
    "307": "PermanentRedirect",
    "400": "AuthorizationHeaderMalformed",
    "401": "AccessDenied",
    "403": "AccessDenied",
    "IllegalLocationConstraintException": "PermanentRedirect",
    "InvalidRegion": "PermanentRedirect",
    "QuotaExceededException": "QuotaExceeded",
    "507": "InsufficientStorage",
    "501": "NotImplemented",
    "RequestExpired": "RequestTimeTooSkewed",
}
"""HEAD answers have no body, so that botocore gives the number for the code."""

_PASSING = {
    "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
    "IncompleteBody", "RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "InternalError", "ServiceUnavailable", "OperationAborted",
    "ConditionalRequestConflict", "TemporaryRedirect",
}  # fmt: skip
"""Try again. Digests too: the bytes were changed on their way, not here."""


def status_of(error: BaseException) -> int:
    """The HTTP status behind a botocore error; 0 when there was no answer."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: BaseException) -> str:
    """The error code an S3 server gave, "" when there was none."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def explain(error: Exception, what: str, place: Place) -> StoreError:
    """The StoreError for an error of botocore. `what` was being done, as in "cannot read s3://bucket/key"."""
    if code_of(error) or status_of(error):
        return _explain_answer(error, what, place)
    return _explain_connection(error, what, place)


def not_s3(what: str, place: Place) -> StoreError:
    """The StoreError for answers that S3 does not give: a console's page, a proxy's login."""
    return StoreError(
        f"{what}: {place.server} does not answer as S3 does",
        hint="is repository.endpoint_url the address of its S3 service, not of a console or a proxy?",
    )


def _explain_answer(error: Exception, what: str, place: Place) -> StoreError:
    code, status = code_of(error), status_of(error)
    if code in ("NoSuchKey", "404"):
        return ObjectMissing(f"{what}: there is no such object")
    if code in _PASSING or status in (408, 425, 429) or (status >= 500 and status not in (501, 507)):
        return StoreError(
            f"{what}: {place.server} answered {status} {code}".rstrip(),
            hint="the server or the way to it is in trouble; try again later",
            transient=True,
        )
    known = (
        _KNOWN.get(code)
        or _KNOWN.get(_AS.get(code, ""))
        or (_KNOWN["AccessDenied"] if status == 403 else None)
    )
    if known:
        happened, hint = (
            text.format(bucket=place.bucket, server=place.server, region=place.region) for text in known
        )
        return StoreError(f"{what}: {happened}", hint=hint)
    said = getattr(error, "response", {}).get("Error", {}).get("Message", "")
    return StoreError(f"{what}: {place.server} answered {status} {code} {one_line(said)}".rstrip())


def _explain_connection(error: Exception, what: str, place: Place) -> StoreError:
    from botocore import exceptions as b

    server = place.server
    if isinstance(error, (b.NoCredentialsError, b.PartialCredentialsError, b.CredentialRetrievalError)):
        return StoreError(
            f"{what}: no credentials for {server}",
            hint="set repository.access_key_id and repository.secret_access_key, or AWS_PROFILE",
        )
    if isinstance(error, b.SSLError):
        return StoreError(
            f"{what}: {server} has no certificate that this machine trusts, or speaks no TLS",
            hint="set repository.ca_bundle to its authority's certificate, or correct endpoint_url",
        )
    if isinstance(error, (b.EndpointConnectionError, b.ConnectTimeoutError, b.ProxyConnectionError)):
        by = " through the proxy" if isinstance(error, b.ProxyConnectionError) else ""
        return StoreError(
            f"{what}: {server} cannot be reached{by}",
            hint="is repository.endpoint_url right, the server up and the network there?",
            transient=True,
        )
    if isinstance(error, (b.ParamValidationError, b.InvalidEndpointConfigurationError, ValueError)):
        return StoreError(f"{what}: {one_line(str(error))}", hint="correct the repository's settings")
    if isinstance(error, (b.ProfileNotFound, b.ConfigNotFound, b.ConfigParseError)):
        return StoreError(f"{what}: {one_line(str(error))}", hint="correct this machine's AWS configuration")
    # What is left: cut or silent connections, answers that end early or that nobody can parse.
    return StoreError(
        f"{what}: the connection to {server} failed ({type(error).__name__})",
        hint="the server or the way to it is in trouble; try again later",
        transient=True,
    )


def one_line(text: str) -> str:
    """The first line of what somebody else said, shortened."""
    return " ".join(str(text).split())[:200]
