"""How the page looks: narrow enough for a phone, light and dark."""

from __future__ import annotations

import base64
from pathlib import Path

CSS = """
.gradio-container > main.fillable { padding: 12px 16px !important; }
.html-container { padding: 0 !important; }
.pop-head h1 { font-size: 1.35rem; font-weight: 700; margin: 0; }
.pop-head p { margin: 2px 0 0; }
.pop-head, .pop-panel, .pop-line, .pop-result { color: var(--body-text-color); overflow-wrap: anywhere; }
.pop-line { min-height: 1.5em; }
.pop-error { color: #b42318; font-weight: 600; }
.dark .pop-error { color: #ff8a80; }
.pop-panel { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 12px;
  min-height: 8.5em; height: 100%; }
.pop-panel h2 { font-size: 1rem; font-weight: 700; margin: 0; }
.pop-panel p { margin: 4px 0; }
.pop-text, .pop-question { white-space: pre-wrap; }
.pop-question { font-weight: 600;
  border-top: 1px solid var(--border-color-primary); padding-top: 6px; margin-top: 10px !important; }
.pop-text mark { background: #ffe08a; color: #1a1a1a; padding: 0 2px; border-radius: 2px; }
.pop-facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 8px; margin: 0; }
.pop-facts > div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 6px 12px; }
.pop-facts dd { font-size: 1.1rem; font-weight: 700; margin: 0; font-variant-numeric: tabular-nums; }
.pop-facts dd span { font-size: 0.85rem; font-weight: 400; }
.pop-result details { margin-top: 8px; }
.pop-result summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
.pop-figure { overflow-x: auto; border-radius: 8px; }
.pop-figure img { width: 100%; min-width: 640px; max-width: 900px; }
.pop-dark, .dark .pop-light { display: none !important; }
.dark .pop-dark { display: block !important; }
#picture img { object-fit: contain; padding-top: 2rem; } /* below the label, which lies on it */
#examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 8px; }
#examples button { min-height: 48px; height: 100%; padding: 4px 8px; justify-content: flex-start; text-align: left;
  white-space: normal; font-size: 0.85rem; font-weight: 400; line-height: 1.25;
  background-repeat: no-repeat; background-position: 6px center; background-size: 40px 40px; }
"""


def thumbnail(element: str, picture: Path) -> str:
    """A rule that shows a small PNG at the left of a button, which has a name of its own."""
    data = base64.b64encode(picture.read_bytes()).decode()
    return f"#examples #{element} {{ background-image: url(data:image/png;base64,{data}); padding-left: 54px; }}\n"
