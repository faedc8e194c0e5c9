"""A model behind HTTP.

`question` reads what clients ask, `batcher` makes batches of it, `app` answers within `limits` as
`described` says, and `server` is the process around it.
"""

from deit import host

try:
    import fastapi  # noqa: F401
    import h11  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise host.missing(f"serving needs {error.name}", "serve") from None
