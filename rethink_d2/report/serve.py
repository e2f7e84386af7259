"""The report while runs go on: made anew when something has changed, and served to a browser."""

import functools
import http.server
import os
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..sweep.state import CLAIM, PLAN, TRAINING_LOCK, held
from .folders import READ
from .page import FOLDER, PAGE, write_report
from .runs import walk

__all__ = ["make_server", "serve", "watch"]

SECONDS = 5
# Asks every few seconds whether the page has changed, and then loads it again; reader.js keeps what was
# opened, hidden, zoomed and scrolled to.
RELOAD = f"""<script>
const asking = setInterval(async () => {{
  const answer = await fetch(location.href, {{ method: "HEAD", cache: "no-store" }}).catch(() => null);
  const made = answer && answer.ok && Date.parse(answer.headers.get("Last-Modified"));
  if (!made || made === Date.parse(document.lastModified)) return;
  clearInterval(asking);
  location.reload();
}}, {SECONDS * 1000});
</script>
"""


def watch(out, seconds=SECONDS):
    """Make the report, and make it anew whenever a run has changed, until Ctrl-C.

    Args:
        out (str): the output folder.
        seconds (float): between two looks, at least.

    Raises:
        ValueError: there is no run in the folder.
    """
    before = _snapshot(out)
    print(write_report(out), flush=True)
    _keep_up(out, before, seconds, threading.Event())


def _keep_up(out, before, seconds, stop):
    """Make the report again after every change since the look `before`, until `stop` is set."""
    pause, said = seconds, None
    while not stop.wait(pause):
        begun = time.monotonic()
        try:
            now = _snapshot(out)
            if now != before:
                write_report(out)
                before, said = now, None
        except Exception as e:  # the disk may be full, the folder being moved: tried again, and said once
            line = f"error: {type(e).__name__}: {' '.join(str(e).split())}"
            if line != said:
                print(line, file=sys.stderr, flush=True)
            said = line
        # The runs that it looks at may need this machine.
        pause = max(seconds, 4 * (time.monotonic() - begun))


def _snapshot(out):
    """Time and size of every file that tells how runs stand, and whose locks are held: a kill writes none."""
    found = {}
    for folder, files in walk(out):
        for name in (*READ, PLAN):
            if name in files:
                try:
                    seen = os.stat(os.path.join(folder, name))
                except OSError:
                    continue
                found[folder, name] = seen.st_mtime_ns, seen.st_size
        for name in (CLAIM, TRAINING_LOCK):
            if name in files:
                found[folder, name] = held(os.path.join(folder, name))
    gallery = Path(out, FOLDER, "gallery")
    found["gallery"] = sorted(path.name for path in gallery.glob("*.html"))
    return found


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of one folder, and nothing that links lead to outside of it.

    Only the report's own pages are HTML; what runs have written is text, whatever it looks like.
    """

    extensions_map = {".png": "image/png", ".pdf": "application/pdf", ".jpg": "image/jpeg"}

    def do_GET(self):
        """Serve a file."""
        self._answer(super().do_GET)

    def do_HEAD(self):
        """The same without content."""
        self._answer(super().do_HEAD)

    def _answer(self, send):
        if urlsplit(self.path).path in ("/", f"/{FOLDER}", f"/{FOLDER}/"):
            self.send_response(302)
            self.send_header("Location", f"/{FOLDER}/{PAGE}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self._inside()
        if path is None:
            self.send_error(404)
        elif path == Path(self.directory, FOLDER, PAGE):
            self._send_page(path)
        else:
            send()

    def _inside(self):
        """The file that is asked for; None where it is no file, or not below the folder."""
        try:
            path = Path(self.directory, unquote(urlsplit(self.path).path).lstrip("/")).resolve()
            return path if path.is_file() and path.is_relative_to(self.directory) else None
        except (OSError, ValueError):  # no path at all
            return None

    def translate_path(self, path):
        """What is sent is exactly what :meth:`_inside` has allowed."""
        return str(self._inside() or "")

    def _send_page(self, path):
        content = path.read_bytes().replace(b"</body>", RELOAD.encode() + b"</body>")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def guess_type(self, path):
        """HTML only in the report's folder."""
        report = Path(self.directory, FOLDER)
        if path.endswith(".html") and Path(path).is_relative_to(report):
            return "text/html; charset=utf-8"
        return self.extensions_map.get(os.path.splitext(path)[1], "text/plain; charset=utf-8")

    def end_headers(self):
        """No guessing of types, no keeping of old files."""
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *args):
        """Requests are no news."""


def make_server(out, host="127.0.0.1", port=0):
    """A server of the folder, not yet serving.

    Raises:
        ValueError: the address cannot be had.
    """
    handler = functools.partial(Handler, directory=os.path.realpath(out))
    try:
        return http.server.ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as e:
        raise ValueError(f"--host {host} --port {port}: {e}; take another port") from e


def serve(out, host, port, seconds=SECONDS):
    """Serve the report until Ctrl-C, and keep it up to date as :func:`watch` does.

    Raises:
        ValueError: there is no run in the folder, or the address cannot be had.
    """
    stop = threading.Event()
    with make_server(out, host, port) as server:
        before = _snapshot(out)
        write_report(out)
        watcher = threading.Thread(target=_keep_up, args=(out, before, seconds, stop))
        watcher.start()
        address, port = server.server_address[:2]
        print(f"http://{address}:{port}/{FOLDER}/{PAGE}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        finally:
            stop.set()
            watcher.join()
