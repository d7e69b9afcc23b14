"""Every knob of one generation: type, default, bounds and one line of help. The one source.

Command-line options, widget sliders, papermill parameters and sweep axes are all made from these fields.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from svdlab.errors import SvdlabError

if TYPE_CHECKING:
    import torch


def _slider(low: float, high: float, step: float, unit: str) -> Any:
    return {"slider": [low, high, step], "unit": unit}


class GenerationSettings(BaseModel):
    """One generation's settings; frozen, checked when made.

    Names and defaults are those of diffusers' ``StableVideoDiffusionPipeline.__call__``.

    Raises:
        SvdlabError: a value that is not allowed, in one line: the field, the value, what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    height: int | None = Field(
        None,
        ge=8,
        multiple_of=8,
        description="pixels; none: the checkpoint's own",
        json_schema_extra=_slider(32, 576, 8, "px"),
    )
    width: int | None = Field(
        None,
        ge=8,
        multiple_of=8,
        description="pixels; none: the checkpoint's own",
        json_schema_extra=_slider(32, 1024, 8, "px"),
    )
    num_frames: int | None = Field(
        None,
        ge=1,
        description="frames of the clip; none: the checkpoint's own",
        json_schema_extra=_slider(1, 25, 1, "frames"),
    )
    num_inference_steps: int = Field(
        25, ge=1, description="denoising steps", json_schema_extra=_slider(1, 50, 1, "steps")
    )
    sigmas: tuple[float, ...] | None = Field(
        None, description="custom noise levels, falling, the last one where sampling ends; instead of a number of steps"
    )
    min_guidance_scale: float = Field(
        1.0, ge=0, description="guidance at the first frame", json_schema_extra=_slider(0, 10, 0.1, "scale")
    )
    max_guidance_scale: float = Field(
        3.0, ge=0, description="guidance at the last frame", json_schema_extra=_slider(0, 10, 0.1, "scale")
    )
    fps: int = Field(
        7, ge=1, description="frames per second; the model is fed fps - 1", json_schema_extra=_slider(1, 30, 1, "1/s")
    )
    motion_bucket_id: int = Field(
        127, ge=0, le=1023, description="amount of motion", json_schema_extra=_slider(1, 255, 1, "bucket")
    )
    noise_aug_strength: float = Field(
        0.02,
        ge=0,
        description="noise added to the image before the encode",
        json_schema_extra=_slider(0, 1, 0.01, "std"),
    )
    decode_chunk_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="frames decoded at a time; none: as if all at once; auto: the same, as many as fit the memory",
        json_schema_extra=_slider(1, 25, 1, "frames"),
    )
    decode: Literal["parity", "exact"] = Field(
        "parity", description="parity: what diffusers gives for the chunk size; exact: independent of it"
    )
    cfg: Literal["batched", "sequential"] = Field(
        "batched", description="guidance in one forward pass, or in two for half the activation memory"
    )
    num_videos_per_prompt: int = Field(1, ge=1, description="videos per image")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of the random generator")
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = Field(
        "float32", description="of weights and activations"
    )

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SvdlabError(_one_line(error)) from None

    @model_validator(mode="after")
    def _check_sigmas(self) -> GenerationSettings:
        if self.sigmas is not None:
            falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
            if len(self.sigmas) < 2 or not falling or not 0 <= self.sigmas[-1] < self.sigmas[0] < float("inf"):
                raise ValueError(f"sigmas: got {list(self.sigmas)}, allowed: two or more finite numbers >= 0, falling")
        return self

    def replace(self, **changes: Any) -> GenerationSettings:
        """The same settings with some fields changed, checked again."""
        return type(self)(**{**self.model_dump(), **changes})

    def to_json(self) -> str:
        """One JSON object."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> GenerationSettings:
        """The inverse of ``to_json``.

        Raises:
            SvdlabError: no JSON object, an unknown field, a value that is not allowed.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise SvdlabError(f"settings: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise SvdlabError(f"settings: got a {type(values).__name__}, allowed: a JSON object")
        if isinstance(values.get("sigmas"), list):
            values["sigmas"] = tuple(values["sigmas"])
        return cls(**values)

    @property
    def num_steps(self) -> int:
        """Denoising steps; explicit sigmas, one more than steps, override ``num_inference_steps``."""
        return len(self.sigmas) - 1 if self.sigmas is not None else self.num_inference_steps

    @property
    def effective_decode_chunk(self) -> int | None:
        """The decode chunk that changes the result: None where every video is decoded as one."""
        chunk = self.decode_chunk_size
        if self.decode == "exact" or not isinstance(chunk, int) or chunk >= (self.num_frames or 0):
            return None
        return chunk

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch knows it."""
        import torch  # here: --help needs the settings and no torch

        return getattr(torch, self.dtype)


def allowed(field: str) -> str:
    """What a field takes, in words: "integer >= 1"."""
    schema = GenerationSettings.model_json_schema()["properties"][field]
    options = schema.get("anyOf", [schema])
    return " or ".join(_words(option) for option in options)


def _words(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(schema.get("enum") or [schema["const"]])
    kinds = {"integer": "integer", "number": "finite number", "null": "none", "array": "falling numbers"}
    words = kinds[schema["type"]]
    for key, sign in (("minimum", ">="), ("maximum", "<="), ("multipleOf", "a multiple of")):
        if key in schema:
            words += f" {sign} {schema[key]:g}"
    return words


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{field}: no such setting, allowed: {', '.join(GenerationSettings.model_fields)}"
    return f"{field}: got {first['input']!r}, allowed: {allowed(field)}"
