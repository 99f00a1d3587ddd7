"""Settings of the server: command line over environment (`CURKV_*`) over file over defaults."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_UNITS = {
    "": 1,
    **{p: 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}i": 1024**i for i, p in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)B?", re.IGNORECASE)


def parse_size(value: Any) -> Any:
    """Reads a size in bytes: `2GiB`, `512 MiB`, `1.5G`, `1048576`; anything but text is passed through.

    Raises:
        ValueError: the text is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size such as 2GiB, 512MiB or 1073741824")
    number, unit = match.groups()
    return int(float(number) * _UNITS[unit.upper().replace("I", "i")])


def split_commas(value: Any) -> Any:
    """Reads several values from one text; anything but text is passed through."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Several = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]
Size = Annotated[int, BeforeValidator(parse_size)]


class Settings(BaseSettings):
    """Everything `curkv serve` can be told.

    `Settings.load(file, **given)` reads a TOML file below the environment; `given` wins over both.
    """

    model_config = SettingsConfigDict(env_prefix="CURKV_", extra="forbid", protected_namespaces=())

    model: str = Field("smollm2-135m-instruct", description="Built-in name, directory, Hub id or GGUF file.")
    served_model_name: str | None = Field(None, description="Name in the API; the model's own if not given.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens it to the network.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")

    weights: Literal["auto", "float32", "int8", "int4"] = Field(
        "auto", description="Type of the linear layers' weights: float32 on CPU, bfloat16 on a GPU, if auto."
    )
    kv_cache_memory: Size | None = Field(
        None, gt=0, description="Memory for the KV cache, e.g. 2GiB; a share of free memory if not given."
    )
    prefix_cache_memory: Size | None = Field(
        None, ge=0, description="Most of it held for repeated prompts, 0 for none; an eighth if not given."
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="Type of cached K, V; int8 has a scale per token and head."
    )
    page_size: int = Field(64, ge=8, le=256, description="Tokens of one KV head per page.")
    max_step_tokens: int = Field(512, ge=16, description="Most tokens per step; longer prompts go in chunks.")
    max_itl: float | None = Field(
        None,
        gt=0,
        description="Seconds that a step with running requests may take; prompt chunks are sized to it.",
    )
    max_sequences: int = Field(64, ge=1, le=4096, description="Most sequences in flight at once.")
    max_model_len: int | None = Field(None, ge=16, description="Most tokens of prompt + output; the model's.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    kernels: Literal["auto", "cpu", "triton", "reference"] = Field(
        "auto", description="Implementation of the kernels."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores if not given.")

    api_key: Several = Field(
        (), description="Key that a request must present; repeatable, or separated by commas.", repr=False
    )
    cors_origin: Several = Field(
        (), description="Web page origin that may use the API from a browser, * for any; repeatable."
    )
    ssl_certfile: Path | None = Field(None, description="Certificate; with it the server speaks HTTPS.")
    ssl_keyfile: Path | None = Field(None, description="Private key of the certificate.")

    kv_policy: str = Field("full", description="Eviction policy of requests that name none.")
    kv_budget: str | None = Field(None, description="Budget of requests that name none: 25%, 512tok, 8MiB.")
    kv_decode_budget: str | None = Field(None, description="Decode budget of requests that name none.")

    max_body_size: Size = Field(
        8 * 1024**2, gt=0, description="Bytes of the largest request body; above it a 413."
    )
    max_waiting: int = Field(1024, ge=1, description="Most sequences in the queue; above it a 429.")
    request_timeout: float | None = Field(
        None, gt=0, description="Seconds after which a request is ended with a 408; none if not given."
    )
    receive_timeout: float = Field(
        30.0, gt=0, description="Seconds in which a request's header, and then its body, have to arrive."
    )
    drain_timeout: float = Field(
        30.0, ge=0, description="Seconds that running requests may take to finish after SIGTERM."
    )

    vllm_metrics: bool = Field(
        False, description="Also emit the gauges that routers read under vLLM's names."
    )

    @property
    def model_name(self) -> str:
        """The name under which the API serves the model."""
        return self.served_model_name or self.model

    @classmethod
    def load(cls, file: Path | None = None, **given: Any) -> Settings:
        """Merges what was given on the command line, the environment and a TOML file.

        Args:
            file: TOML file with the fields of this class at its top level.
            **given: fields set explicitly; None and [] count as not given.

        Raises:
            pydantic.ValidationError: a field is unknown or has a bad value.
            OSError: the file cannot be read.
            tomllib.TOMLDecodeError: the file is no TOML.
        """
        explicit = {name: value for name, value in given.items() if value not in (None, [])}
        settings = cls(**explicit)
        if file is None:
            return settings
        lower = {
            k: v for k, v in tomllib.loads(file.read_text()).items() if k not in settings.model_fields_set
        }
        return cls(**lower, **explicit)
