"""A model behind HTTP.

`connection` and `outermost` refuse what is no request for this server. `question` reads requests, `decoders` make
pixels of their images, `batcher` joins these into batches, and `app` answers within `limits`. `described` holds the
API's description, and `server` is the process around all of it.
"""

from deit import host

try:
    import fastapi  # noqa: F401
    import h11  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise host.missing(f"serving needs {error.name}", "serve") from None
