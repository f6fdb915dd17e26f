"""Bodies of requests: JSON with base64, or multipart with files, read into the same fields."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from car_serve.errors import ServeError, bad_request
from car_serve.uploads import to_base64

Form = TypeVar("Form", bound=BaseModel)
Share = Annotated[float, Field(ge=0, le=1)]


class EditForm(BaseModel):
    """What to keep of an earlier image."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    id: str | None = Field(default=None, max_length=64, description="an earlier result, by id")
    index: int = Field(default=0, ge=0, description="which of its images")
    image: str | None = Field(default=None, description="or an image, base64")
    scale: int | None = Field(default=None, ge=0, description="branch: the last scale to keep")
    mask: str | None = Field(default=None, description="in-paint: an image, base64, light where to draw anew")
    frame: tuple[Share, Share, Share, Share] | None = Field(
        default=None, description="extend: left, top, right, bottom of where the image goes in the new, larger square"
    )
    rule: str = Field(default="published", max_length=16, description="of a mask: published or strict")


class PictureForm(BaseModel):
    """An image to draw. Settings have the names and defaults of `Plan.generate`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)
    plan: str | None = Field(default=None, max_length=200, description="by name; the first plan by default")
    control: str | dict[str, str | tuple[str, float]] | None = Field(
        default=None, description="control map, base64; or {branch: base64 or [base64, weight]}, mixed"
    )
    photo: str | dict[str, str | tuple[str, float]] | None = Field(
        default=None, description="a photo to derive the control map from, likewise"
    )
    label: int | str | None = Field(default=None, alias="class", description="class, by index or name")
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="of the first image; drawn by chance where left out"
    )
    n: int = Field(default=1, ge=1, le=1024, description="images, with seeds seed, seed + 1, …")
    cfg: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    preset: str | None = Field(default=None, max_length=40)
    more_smooth: bool = False
    control_cfg: float = 0.0
    cfg_scales: str | int | None = None
    control_scales: str | int | None = None
    control_strength: float | None = None
    stop_after: int | None = None
    fit: str | None = Field(default=None, max_length=16)
    edit: EditForm | None = None
    previews: bool | Annotated[list[int], Field(max_length=1024)] = Field(
        default=True, description="whether scale events carry previews, or those of which scales do"
    )


class ControlForm(BaseModel):
    """A photo to make a map of, or a map to look over."""

    model_config = ConfigDict(extra="forbid")
    plan: str | None = Field(default=None, max_length=200)
    photo: str | dict[str, str] | None = Field(default=None, description="base64, or {branch: base64}")
    control: str | dict[str, str] | None = Field(default=None, description="base64, or {branch: base64}")
    fit: str | None = Field(default=None, max_length=16)
    invert: bool = Field(default=False, description="swap light and dark")


def body_of(form: type[BaseModel]) -> dict[str, Any]:
    """The part of an OpenAPI operation that describes a body read by `read_form`."""
    schema = {"$ref": f"#/components/schemas/{form.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read_form(request: Request, form: type[Form]) -> Form:
    """The fields of a body, checked. Raises ServeError: 400 broken, 415 of another kind, 422 a field."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        fields = await _multipart(request)
    elif kind == "application/json":
        fields = await _json(request)
    else:
        raise ServeError(
            415,
            "content_type",
            f"the body's content type is {kind[:60]!r}; send application/json or multipart/form-data",
        )
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise ServeError(
            422, "bad_field", f"{where[:80]}: {first['msg']}; see /openapi.json for the fields", param=where[:80]
        ) from error


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request("the body is not JSON; send one object") from error


def _no_constant(name: str) -> None:
    raise ValueError(name)


async def _multipart(request: Request) -> dict[str, Any]:
    """Files become base64, "edit.mask" the field mask of edit, "control.hed" the branch hed of control."""
    fields: dict[str, Any] = {}
    async with request.form(max_files=8, max_fields=64, max_part_size=16 * 1024 * 1024) as form:
        for name, value in form.multi_items():
            text: Any = to_base64(await value.read()) if isinstance(value, UploadFile) else value
            if name == "edit" and isinstance(text, str):
                try:
                    fields.setdefault("edit", {}).update(json.loads(text))
                except (ValueError, TypeError, RecursionError) as error:
                    raise bad_request("edit is not a JSON object; send one", "edit") from error
            elif name.startswith(("edit.", "control.", "photo.")):
                whole, _, part = name.partition(".")
                if not isinstance(fields.setdefault(whole, {}), dict):
                    raise bad_request(f"{whole} and {name[:80]} are both given; give one of them", whole)
                fields[whole][part] = text
            else:
                fields[name.removesuffix("[]")] = text
    return fields
