"""Serve a run's predictions: ``RUN=runs/demo uvicorn examples.serve:app``."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from engine.predict import OverloadedError, Predictor, RequestBatcher
from engine.utils.errors import InputError


class Texts(BaseModel):
    """The body of a request: texts, or lists of the two of a pair."""

    examples: list[str | list[str]]


@asynccontextmanager
async def lifespan(service: FastAPI) -> AsyncIterator[None]:
    """Load the run before the first request; answer those that wait before the end."""
    service.state.batcher = RequestBatcher(Predictor(os.environ.get("RUN", "runs/demo")))
    yield
    await service.state.batcher.close()


app = FastAPI(lifespan=lifespan)


@app.post("/tasks/{task}")
async def predict(task: str, texts: Texts) -> list[dict[str, Any]]:
    """Answer the examples of a task."""
    return [answer._asdict() for answer in await app.state.batcher.predict(task, texts.examples)]


@app.post("/embed")
async def embed(texts: Texts) -> list[list[float]]:
    """Return a vector for each sentence."""
    return (await app.state.batcher.embed(texts.examples)).tolist()


@app.get("/health")
async def health() -> dict[str, int]:
    """Say that the service runs, and how many examples wait."""
    return {"waiting": app.state.batcher.waiting}


@app.exception_handler(InputError)
async def refuse(_: Request, error: InputError) -> JSONResponse:
    """Answer what cannot be used by 422 and the engine's line."""
    return JSONResponse({"error": str(error)}, status_code=422)


@app.exception_handler(OverloadedError)
async def turn_away(_: Request, error: OverloadedError) -> JSONResponse:
    """Answer by 503 while too many wait."""
    return JSONResponse({"error": str(error)}, status_code=503, headers={"Retry-After": "1"})
