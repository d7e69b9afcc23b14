"""Every knob of one generation: type, default, bounds and one line of help. The one source.

Command-line options, widget sliders, papermill parameters and sweep axes are all made from these fields.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from svdlab.errors import SvdlabError, short
from svdlab.reading import parse

if TYPE_CHECKING:
    import torch

# What the rest can hold: H.264's largest picture, a trace's three digits for a step, float16's largest number for noise
# and for the first latents, which are of unit variance times the first sigma.
MAX_SIDE, MAX_FRAMES, MAX_STEPS = 16384, 10_000, 1000
MIN_SIGMA, MAX_SIGMA = 1e-6, 1e4
# Of a device's memory, what no simulation counts: a CUDA context takes about half a GiB, kernels' workspaces the rest.
GIB, RESERVE_GIB = 2**30, 0.75


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
        le=MAX_SIDE,
        multiple_of=8,
        description="pixels; none: the checkpoint's own",
        json_schema_extra=_slider(32, 576, 8, "px"),
    )
    width: int | None = Field(
        None,
        ge=8,
        le=MAX_SIDE,
        multiple_of=8,
        description="pixels; none: the checkpoint's own",
        json_schema_extra=_slider(32, 1024, 8, "px"),
    )
    num_frames: int | None = Field(
        None,
        ge=1,
        le=MAX_FRAMES,
        description="frames of the clip; none: the checkpoint's own",
        json_schema_extra=_slider(1, 25, 1, "frames"),
    )
    num_inference_steps: int = Field(
        25, ge=1, le=MAX_STEPS, description="denoising steps", json_schema_extra=_slider(1, 50, 1, "steps")
    )
    sigmas: tuple[float, ...] | None = Field(
        None, description="custom noise levels, falling, the last one where sampling ends; instead of a number of steps"
    )
    schedule: Literal["karras", "ays"] = Field(
        "karras", description="noise levels: karras, the scheduler's own, or ays, Align Your Steps' for SVD"
    )
    min_guidance_scale: float = Field(
        1.0, ge=0, le=100, description="guidance at the first frame", json_schema_extra=_slider(0, 10, 0.1, "scale")
    )
    max_guidance_scale: float = Field(
        3.0, ge=0, le=100, description="guidance at the last frame", json_schema_extra=_slider(0, 10, 0.1, "scale")
    )
    fps: int = Field(
        7,
        ge=1,
        le=1000,
        description="frames per second; the model is fed fps - 1",
        json_schema_extra=_slider(1, 30, 1, "1/s"),
    )
    motion_bucket_id: int = Field(
        127, ge=0, le=1023, description="amount of motion", json_schema_extra=_slider(1, 255, 1, "bucket")
    )
    noise_aug_strength: float = Field(
        0.02,
        ge=0,
        le=100,
        description="noise added to the image before the encode",
        json_schema_extra=_slider(0, 1, 0.01, "std"),
    )
    decode_chunk_size: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | Literal["auto"] | None = Field(
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
    num_videos_per_prompt: int = Field(1, ge=1, le=1000, description="videos per image")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of the random generator")
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = Field(
        "float32", description="of weights and activations"
    )

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SvdlabError(_one_line(error, type(self))) from None

    @model_validator(mode="after")
    def _check_sigmas(self) -> GenerationSettings:
        if self.sigmas is not None:
            if self.schedule != "karras":
                raise ValueError(f"schedule: got {self.schedule} beside sigmas, allowed: one of the two")
            *noisy, last = self.sigmas or (0.0,)
            inside = all(MIN_SIGMA <= sigma <= MAX_SIGMA for sigma in (*noisy, *(last,) * (last != 0)))
            # Sampling is in float32: two that are one number there are no step.
            falling = inside and all(_float32(a) > _float32(b) for a, b in itertools.pairwise(self.sigmas))
            if not falling or not 2 <= len(self.sigmas) <= MAX_STEPS + 1:
                raise ValueError(
                    f"sigmas: got {short(list(self.sigmas))}, allowed: 2 to {MAX_STEPS + 1} falling numbers from "
                    f"{MIN_SIGMA:g} to {MAX_SIGMA:g}, the last may be 0"
                )
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
        values = parse(text, "settings")
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


_Rate = Annotated[int, Field(ge=1, le=1000)] | Annotated[float, Field(ge=1, le=1000)]
_Bucket = Annotated[int, Field(ge=0, le=1023)] | Annotated[float, Field(ge=0, le=1023)]


class CallSettings(GenerationSettings):
    """Of a call of the pipeline: the model can be fed a fraction of a frame rate, which a video file cannot have."""

    fps: _Rate = 7  # type: ignore[assignment]
    motion_bucket_id: _Bucket = 127  # type: ignore[assignment]

    if TYPE_CHECKING:

        def __init__(self, **values: Any): ...


def allowed(field: str, settings: type[GenerationSettings] = GenerationSettings) -> str:
    """What a field takes, in words: "integer >= 1"."""
    schema = settings.model_json_schema()["properties"][field]
    options = schema.get("anyOf", [schema])
    return " or ".join(_words(option) for option in options)


def _words(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(schema.get("enum") or [schema["const"]])
    kinds = {"integer": "integer", "number": "finite number", "null": "none", "array": "falling numbers"}
    words = kinds[schema["type"]]
    bounds = (("minimum", ">="), ("maximum", "<="), ("multipleOf", "a multiple of"))
    return f"{words} {', '.join(f'{sign} {schema[key]}' for key, sign in bounds if key in schema)}".strip()


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _one_line(error: ValidationError, settings: type[GenerationSettings]) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{field[:60]}: no such setting, allowed: {', '.join(settings.model_fields)}"
    return f"{field}: got {short(first['input'])}, allowed: {allowed(field, settings)}"
