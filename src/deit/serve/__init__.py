"""A model behind HTTP.

`question` reads requests, `batcher` joins their images into batches, and `app` answers within `limits`. `described`
holds the API's description, and `server` is the process around all of it.
"""

from deit import host

try:
    import fastapi  # noqa: F401
    import h11  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise host.missing(f"serving needs {error.name}", "serve") from None
