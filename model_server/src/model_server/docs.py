"""The documentation of the API, also for a browser that has no internet."""

from importlib.resources import files
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse

from model_server.asking import Call

DESCRIPTION = """\
Two protocols for the same models: the **native** one, and the **Open Inference Protocol** (V2)
under `/v2`. A model is meant by its name and a version or an alias of the registry; `pyfunc` or
`sklearn` is the flavor that it is loaded as. JSON has no NaN and no infinity: in answers both, and
every missing value, are `null`. What is wrong with a request is told in a sentence, `detail` in the
native protocol and `error` in V2; a status of 503 comes with `Retry-After`. Every answer has an
`X-Request-ID`, the one that was sent or a new one.
"""

_MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def show_start(call: Call) -> RedirectResponse:
    """Send a browser to the documentation."""
    return RedirectResponse(f"{call.settings.root_path}/docs")


@router.get("/docs")
async def show_docs(call: Call) -> HTMLResponse:
    """Swagger UI."""
    assets = f"{call.settings.root_path}/docs"
    return get_swagger_ui_html(
        openapi_url=f"{call.settings.root_path}/openapi.json",
        title=call.request.app.title,
        swagger_js_url=f"{assets}/swagger-ui-bundle.js",
        swagger_css_url=f"{assets}/swagger-ui.css",
        swagger_favicon_url=f"{assets}/favicon.png",
    )


@router.get("/docs/{name}")
def show_asset(
    name: Literal["swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"],
) -> Response:
    """What Swagger UI is made of; fastapi's own page would fetch it from the internet."""
    content = files("fastapi_offline").joinpath("static", name).read_bytes()
    headers = {"Cache-Control": "max-age=86400"}
    return Response(content, media_type=_MEDIA_TYPES[name], headers=headers)
