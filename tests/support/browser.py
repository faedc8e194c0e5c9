"""The browser that pages are tested in, and axe-core, which knows what keeps people from using them."""

import os
import re
import shutil
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LATIN_WORDS = re.compile(r"[A-Za-z]+ [A-Za-z]+")
"""What a Chinese page has none of."""
AXE = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))
