"""The limit: bare FastAPI that reads nothing and always answers the same."""

import orjson
from fastapi import FastAPI, Response

app = FastAPI()
ANSWER = {"prediction": [0]}


@app.post("/{model}/{version}")
async def predict(model: str, version: str) -> Response:
    """The constant."""
    return Response(orjson.dumps(ANSWER), media_type="application/json")
