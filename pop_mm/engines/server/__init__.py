"""``pop-mm serve``: an OpenAI endpoint for one pruned model, made of transformers' own chat server.

:mod:`.asked` checks what a request asks for, :mod:`.line` lets one request at a time generate, :mod:`.model` keeps the session,
:mod:`.chat` is transformers' handler on top of them, :mod:`.web` the application and :mod:`.run` the process. The packages of
the extra ``[serve]`` are imported by the last three alone.
"""

from .errors import RequestError
from .limits import Limits

__all__ = ["Limits", "RequestError"]
