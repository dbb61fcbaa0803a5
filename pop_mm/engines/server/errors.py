"""A request that is not answered, in the form in which OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from ...errors import PopError


class RequestError(PopError):
    """A request is refused, or could not be completed.

    Parameters
    ----------
    status : int
        Of HTTP.
    message : str
        A sentence: what was asked, what was found, what to do.
    code : str, optional
        For programs: ``"model_not_found"``, ``"context_length_exceeded"`` ...
    param : str, optional
        The field of the body that is wrong.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


__all__ = ["RequestError"]
