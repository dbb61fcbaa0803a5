"""``pop-mm app``: a web page that answers one question dense and pruned, side by side.

:mod:`.asker` answers and knows no web page; :mod:`.page` is the page and :mod:`.server` serves it on 127.0.0.1. gradio (the
extra ``[app]``) is imported only when a page is opened.
"""

from .asker import Asker, AskError
from .progress import Answer, Progress, Turn

__all__ = ["Answer", "AskError", "Asker", "Progress", "Turn"]
