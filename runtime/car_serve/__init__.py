"""Serve plans over HTTP: the studio, our own routes, OpenAI's images API, health and metrics.

`app` builds the application; `server` runs it (`car-run serve`), `ray_app` on a Ray cluster. A request is read by
`forms`, turned into a runtime request by `requests`, waits in a `batcher` and leaves through `own_routes` or
`openai_routes`.
Of the runtime only its public interface is used; FastAPI and uvicorn come with the extra `serve`, Ray with `ray`.
"""
