"""A reader for the demonstration, through the same pages a person uses: sign in, claim, draft, sign, fetch images.

Servers may be killed meanwhile: a request that meets no server, or 503, is made again until `patience_s` is over.
"""

import email
import email.policy
import hashlib
import time
from io import BytesIO

import httpx
import pydicom

from storage.errors import PermanentError, RetryableError

_PAUSE_S = 0.5
_MULTIPART_DICOM = 'multipart/related; type="application/dicom"; transfer-syntax=*'


class DemoReader:
    """One signed-in reader."""

    def __init__(self, base_url: str, username: str, password: str, *, patience_s: float) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=30)
        self._patience_s = patience_s
        self._csrf = ""
        answer = self._send("POST", "/sign-in", data={"username": username, "password": password})
        if answer.status_code != httpx.codes.SEE_OTHER:
            raise PermanentError(f"{username} could not sign in ({answer.status_code})")
        self._csrf = self._ok(self._send("GET", "/session")).json()["csrf"]

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()

    def _send(
        self, method: str, path: str, *, data: dict[str, str] | None = None, accept: str = "application/json"
    ) -> httpx.Response:
        deadline = time.monotonic() + self._patience_s
        headers = {"Accept": accept, "X-CSRF-Token": self._csrf}
        while True:
            try:
                answer = self._http.request(method, path, data=data, headers=headers)
                if answer.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                    return answer
                why = f"{answer.status_code}"
            except httpx.TransportError as error:
                why = type(error).__name__
            if time.monotonic() > deadline:
                raise RetryableError(f"{method} {path}: {why} for {self._patience_s:.0f} s")
            time.sleep(_PAUSE_S)

    @staticmethod
    def _ok(answer: httpx.Response) -> httpx.Response:
        if answer.is_success:
            return answer
        raise PermanentError(
            f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:300]}"
        )

    def claim(self, case_id: int) -> str:
        """Claim a case. Returns the lease token."""
        lease: str = self._ok(self._send("POST", f"/cases/{case_id}/claim")).json()["lease"]
        return lease

    def draft(self, case_id: int, lease: str, text: dict[str, str]) -> int:
        """Save a draft. Returns its revision; a save whose answer was lost is recognised by its text."""
        answer = self._send("POST", f"/cases/{case_id}/draft", data={"lease": lease, "revision": "0", **text})
        if answer.status_code == httpx.codes.CONFLICT and answer.json().get("text", {}).items() >= text.items():
            return int(answer.json()["revision"])
        return int(self._ok(answer).json()["revision"])

    def sign(self, case_id: int, lease: str, revision: int, images: int, pin: str) -> bool:
        """Sign the draft for the `images` seen. False: it was signed already (an earlier try's answer was lost)."""
        form = {"lease": lease, "revision": str(revision), "images": str(images), "pin": pin}
        answer = self._send("POST", f"/cases/{case_id}/sign", data=form)
        if answer.status_code == httpx.codes.CONFLICT and answer.json().get("type") == "signed":
            return False
        self._ok(answer)
        return True

    def data_set_digests(self, case_id: int, study_instance_uid: str) -> dict[str, str]:
        """Fetch a study by WADO-RS. Returns SHA-256 of each data set by SOP Instance UID."""
        path = f"/cases/{case_id}/dicomweb/studies/{study_instance_uid}"
        answer = self._ok(self._send("GET", path, accept=_MULTIPART_DICOM))
        head = b"Content-Type: " + answer.headers["content-type"].encode() + b"\r\n\r\n"
        message = email.message_from_bytes(head + answer.content, policy=email.policy.HTTP)
        digests = {}
        for part in message.iter_parts():
            content = part.get_payload(decode=True)
            uid, data_set = split_part10(bytes(content))
            digests[uid] = hashlib.sha256(data_set).hexdigest()
        return digests


def split_part10(content: bytes) -> tuple[str, bytes]:
    """Part 10 bytes to (Media Storage SOP Instance UID, data set bytes)."""
    meta = pydicom.dcmread(BytesIO(content), specific_tags=["SOPInstanceUID"], stop_before_pixels=True).file_meta
    # (0002,0000) UL: 12 bytes on disk, and its value counts from behind them (PS3.10 7.1).
    return str(meta.MediaStorageSOPInstanceUID), content[128 + 4 + 12 + meta.FileMetaInformationGroupLength :]
